"""`ButterflyMoECallback`: swaps a module's feed-forward blocks and drives their training."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.callbacks import guards, late_build
from lightning_bfmoe.callbacks import settings as given
from lightning_bfmoe.callbacks.angle_warmup import AngleWarmup
from lightning_bfmoe.callbacks.calibrating import Calibrator
from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.callbacks.parts import Part
from lightning_bfmoe.callbacks.router_balance import RouterBalance
from lightning_bfmoe.callbacks.summary import show_summary
from lightning_bfmoe.callbacks.swapping import Swapper, merge_reports
from lightning_bfmoe.callbacks.ternary_schedule import TernarySchedule
from lightning_bfmoe.callbacks.trainable import TrainableSet, check_wrapped, watch_wrapped
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.plan import Plan, PlanState
from lightning_bfmoe.swap import SwapReport

ANGLE_LR_FACTORS = {"preserve": 5.0, "scratch": 20.0}  # "calibrated" is a "preserve", too


class ButterflyMoECallback(pl.Callback):
    """Trains any LightningModule with ButterflyMoE layers in place of its feed-forward blocks.

    The module is not edited. Its blocks are swapped before its optimizers are built and before a
    checkpoint is loaded, in every stage; lambda rises by the plan; angles get their own parameter
    groups in the module's own optimizers; the routing is balanced.

    It is made of a swap and three callbacks that also work alone, after `swap_feed_forward`:
    `TernarySchedule`, `AngleWarmup` and `RouterBalance`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ButterflyMoECallback(num_experts=64)], logger=False)

    Args:
        num_experts: Experts per layer (count). None: that of `config` or `preset`, 8 by default.
        top_k: Experts that each token visits (count). None: 2 by default.
        include: Paths or patterns of the blocks to swap; every block that is found when None.
        exclude: Paths or patterns of blocks to leave alone.
        config: Settings that the single ones override.
        preset: Named settings instead of `config`: "default" or "paper".
        plan: When the weights become ternary, and what holds when: warm-up of the angles, frozen
            latents, a second stage. None: ``Plan()``; ternary throughout with
            ``init="scratch"``, and with "calibrated", there with frozen latents in the first half.
        total_steps: Optimizer steps of the whole training. None: the Trainer's estimate.
        replan: On resume, whether to plan anew when the Trainer's estimate has changed. False keeps
            the planned total of the checkpoint.
        angle_lr_factor: Learning rate of the angles over that of the other parameters. None: 5 with
            ``init="preserve"``, where larger steps spoil a short fine-tuning, 20 with "scratch".
        evaluate_ternary: Validate, test and predict at lambda 1, as the packed model computes. A
            checkpoint that is chosen by its validation loss then packs well; without it the best
            one may be from before the weights were ternary.
        name: Tells several callbacks apart, in checkpoints and in logged names.
        verbose: Print what was swapped, once.
        init: "calibrated" fits the layers to batches of the training data before the first step, in
            closed form (`calibrated_swap`); a training that is resumed does not. Else, as for all
            that follow, see `ButterflyMoEConfig`; None keeps the value there.
        calibration_batches: Batches that are read for it (count); 32 when None.
        calibration: Further settings, such as `forward_fn`, which feeds a batch to the module.
        angle_std: Standard deviation of the initial angles (radians).
        stages: Stages per rotation (count).
        gains: Per-expert diagonal gains.
        scale: Ternary scale.
        granularity: One scale per row, or per matrix.
        down: "butterfly", or "dense" for one shared fp32 projection behind the experts.
        activation_bits: Width of the integers that activations are rounded to before they enter a
            ternary matrix (bits).
        activation: Name in `layers.activation`; None keeps the block's own.
        dropout: Probability on the hidden units; None keeps the block's own.
        balance_rate: Step of the balance bias per optimizer step (score units).
        switch_weight: Weight of the Switch loss.
        z_weight: Weight of the router z-loss.
        router_noise: Standard deviation of the router's noise in training (logit units).
        correction_rank: Rank of a dense low-rank branch beside the experts.
        seed: Seed of the layers' own generator.

    Raises:
        ConfigError: A setting or the plan is out of range.
    """

    report: SwapReport | None = None
    """What the last swap did; its originals are let go, so it cannot `restore`."""

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        config: ButterflyMoEConfig | None = None,
        preset: Literal["default", "paper"] | None = None,
        plan: Plan | None = None,
        total_steps: int | None = None,
        replan: bool = False,
        angle_lr_factor: float | None = None,
        evaluate_ternary: bool = False,
        name: str | None = None,
        verbose: bool = True,
        init: Literal["preserve", "scratch", "calibrated"] | None = None,
        calibration_batches: int | None = None,
        calibration: Calibration | None = None,
        angle_std: float | None = None,
        stages: int | None = None,
        gains: bool | None = None,
        scale: Literal["lstsq", "absmean"] | None = None,
        granularity: Literal["row", "tensor"] | None = None,
        down: Literal["butterfly", "dense"] | None = None,
        activation_bits: int | None = None,
        activation: str | None = None,
        dropout: float | None = None,
        balance_rate: float | None = None,
        switch_weight: float | None = None,
        z_weight: float | None = None,
        router_noise: float | None = None,
        correction_rank: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        overrides = {
            "num_experts": num_experts, "top_k": top_k, "init": init, "angle_std": angle_std,
            "stages": stages, "gains": gains, "scale": scale, "granularity": granularity,
            "down": down, "activation_bits": activation_bits, "activation": activation,
            "dropout": dropout, "balance_rate": balance_rate,
            "switch_weight": switch_weight, "z_weight": z_weight, "router_noise": router_noise,
            "correction_rank": correction_rank, "seed": seed,
        }  # fmt: skip
        self.config = given.resolve_config(config, preset, overrides)
        self._wrapped: TrainableSet | None = None
        self.include, self.exclude = (
            given.resolve_patterns(include),
            given.resolve_patterns(exclude),
        )
        self.name, self.verbose = name, verbose
        calibrated = given.resolve_calibration(init, calibration_batches, calibration)
        self._swapper = Swapper(
            self.config, self.include, self.exclude, name or "bfmoe", calibrated is not None
        )
        self._calibrator = None if calibrated is None else Calibrator(calibrated, self._swapper)
        if angle_lr_factor is None:
            angle_lr_factor = ANGLE_LR_FACTORS[self.config.init]
        self.schedule = TernarySchedule(
            given.resolve_plan(plan, given.default_plan(self.config, calibrated is not None)),
            total_steps=total_steps,
            replan=replan,
            evaluate_ternary=evaluate_ternary,
            name=name,
        )
        self.angles = AngleWarmup(angle_lr_factor, name=name)
        self.angles.follow(self.schedule)
        self.parts: tuple[Part, ...] = (self.schedule, self.angles, RouterBalance(name))
        for part in self.parts:
            part.holder = self

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    @property
    def plan(self) -> Plan:
        """When what holds."""
        return self.schedule.plan

    @property
    def clock(self) -> StepClock:
        """Finished and planned optimizer steps."""
        return self.schedule.clock

    @property
    def now(self) -> PlanState:
        """What the plan says for the next optimizer step.

        Raises:
            ConfigError: The plan is in fractions and the training has not begun.
        """
        return self.schedule.now

    @property
    def angle_lr_factor(self) -> float:
        """Learning rate of the angles over that of the other parameters."""
        return self.angles.angle_lr_factor

    def find(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """This callback's layers in a module, with their paths."""
        return self._swapper.layers(module)

    # Before training: swap, wait for layers that are built later, check, split the groups.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        guards.check_order(trainer, self)
        guards.check_strategy(trainer, pl_module)
        self._forward("setup", trainer, pl_module, stage)
        if not self._swapper.was_here(pl_module):
            self._look(pl_module)
        late_build.watch(pl_module, self._owner, lambda new: self._look_again(pl_module, new))
        if not late_build.is_watched(pl_module, self._owner):
            self._swapper.check_found()
        if self._calibrator is not None and stage == "fit":
            self._calibrator.watch(trainer, pl_module, self)

    def _look(self, pl_module: pl.LightningModule) -> None:
        report = self._swapper.swap(pl_module)
        if report is not None:
            self.report = report
            self._swapper.set_blend(pl_module, 1.0 if self.plan.end == 0 else 0.0)
            if self.verbose:
                show_summary(report)

    def _look_again(self, pl_module: pl.LightningModule, new_modules: bool) -> None:
        earlier = self.report
        if new_modules:
            self._look(pl_module)
        if earlier is not None and self.report is not None and self.report is not earlier:
            self.report = merge_reports(earlier, self.report)
        if not late_build.is_watched(pl_module, self._owner):
            self._swapper.check_found()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_swapped(trainer, pl_module)
        layers = [layer for _, layer in self.find(pl_module)]
        optimizers = trainer.strategy.optimizers
        guards.check_optimizers(pl_module, optimizers, layers, self._swapper.replaced)
        self._wrapped = watch_wrapped(trainer, pl_module)
        self._forward("on_fit_start", trainer, pl_module)

    def _check_swapped(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in (pl_module, *guards.averaged_copies(trainer)):
            for inner in module.modules():
                late_build.unwatch(inner, self._owner)
        self._swapper.check_found()

    # The rest is done by the parts.

    def _forward(self, hook: str, *arguments: Any) -> None:
        for part in self.parts:
            getattr(part, hook)(*arguments)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_swapped(trainer, pl_module)
        self._forward("on_validation_start", trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forward("on_validation_end", trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forward("on_train_start", trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        check_wrapped(self._wrapped)
        self._forward("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._forward("on_before_backward", trainer, pl_module, loss)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._forward("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forward("on_train_end", trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unwatch(pl_module)
        self._forward("teardown", trainer, pl_module, stage)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._unwatch(pl_module)
        self._forward("on_exception", trainer, pl_module, exception)

    def _unwatch(self, pl_module: pl.LightningModule) -> None:
        late_build.unwatch(pl_module, self._owner)
        self._wrapped = None
        if self._calibrator is not None:
            self._calibrator.unwatch(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._calibrator is not None:
            self._calibrator.drop()  # what was calibrated and trained comes from there

    def state_dict(self) -> dict[str, Any]:
        return {**self.angles.state_dict(), **self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)
        self.angles.load_state_dict(state_dict)

    @property
    def _owner(self) -> str:
        return self._swapper.owner
