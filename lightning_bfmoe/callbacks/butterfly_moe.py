"""`ButterflyMoECallback`: swaps a module's feed-forward blocks and drives their training."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bfmoe.callbacks import guards, late_build, training
from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.callbacks.settings import resolve_config, resolve_patterns, resolve_plan
from lightning_bfmoe.callbacks.summary import show_summary
from lightning_bfmoe.callbacks.swapping import Swapper, merge_reports
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import CheckpointError
from lightning_bfmoe.plan import Plan, PlanState, check_factor, plan_at
from lightning_bfmoe.swap import SwapReport

_STATE_VERSION = 1
ANGLE_LR_FACTORS = {"preserve": 5.0, "scratch": 20.0}


class ButterflyMoECallback(pl.Callback):
    """Trains any LightningModule with ButterflyMoE layers in place of its feed-forward blocks.

    The module is not edited. Its blocks are swapped before its optimizers are built and before a
    checkpoint is loaded, in every stage; lambda rises by the plan; angles get their own parameter
    groups in the module's own optimizers.

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
        plan: When the weights become ternary; ``Plan()`` when None.
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
        init: See `ButterflyMoEConfig`, as for all that follow; None keeps the value there.
        angle_std: Standard deviation of the initial angles (radians).
        stages: Stages per rotation (count).
        gains: Per-expert diagonal gains.
        scale: Ternary scale.
        granularity: One scale per row, or per matrix.
        activation: Name in `layers.activation`; None keeps the block's own.
        dropout: Probability on the hidden units; None keeps the block's own.
        balance_rate: Step of the balance bias per optimizer step (score units).
        switch_weight: Weight of the Switch loss.
        z_weight: Weight of the router z-loss.
        router_noise: Standard deviation of the router's noise in training (logit units).
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
        init: Literal["preserve", "scratch"] | None = None,
        angle_std: float | None = None,
        stages: int | None = None,
        gains: bool | None = None,
        scale: Literal["lstsq", "absmean"] | None = None,
        granularity: Literal["row", "tensor"] | None = None,
        activation: str | None = None,
        dropout: float | None = None,
        balance_rate: float | None = None,
        switch_weight: float | None = None,
        z_weight: float | None = None,
        router_noise: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        overrides = {
            "num_experts": num_experts, "top_k": top_k, "init": init, "angle_std": angle_std,
            "stages": stages, "gains": gains, "scale": scale, "granularity": granularity,
            "activation": activation, "dropout": dropout, "balance_rate": balance_rate,
            "switch_weight": switch_weight, "z_weight": z_weight, "router_noise": router_noise,
            "seed": seed,
        }  # fmt: skip
        self.config = resolve_config(config, preset, overrides)
        self.plan = resolve_plan(plan)
        self.include, self.exclude = resolve_patterns(include), resolve_patterns(exclude)
        self.total_steps, self.replan = total_steps, replan
        if angle_lr_factor is None:
            angle_lr_factor = ANGLE_LR_FACTORS[self.config.init]
        self.angle_lr_factor = check_factor(angle_lr_factor)
        self.evaluate_ternary, self.name, self.verbose = evaluate_ternary, name, verbose
        self.clock = StepClock()
        self._swapper = Swapper(self.config, self.include, self.exclude, name or "bfmoe")
        self._restored = False
        self._handles: list[Any] = []
        self._parts: training.Parts | None = None
        self._put_back: Callable[[], None] = _nothing

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    # Before training: swap, wait for layers that are built later, check, split the groups.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        guards.check_order(trainer, self)
        guards.check_strategy(trainer, pl_module)
        self._restored = False
        if not self._swapper.was_here(pl_module):
            self._look(pl_module)
        late_build.watch(pl_module, self._owner, lambda new: self._look_again(pl_module, new))
        if not late_build.is_watched(pl_module, self._owner):
            self._swapper.check_found()

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
        layers = [layer for _, layer in self._swapper.layers(pl_module)]
        optimizers = trainer.strategy.optimizers
        guards.check_optimizers(pl_module, optimizers, layers, self._swapper.replaced)
        training.split_groups(trainer, pl_module, self.angle_lr_factor)

    def _check_swapped(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in (pl_module, *guards.averaged_copies(trainer)):
            for inner in module.modules():
                late_build.unwatch(inner, self._owner)
        self._swapper.check_found()

    # Validation, test, prediction: lambda of the step, or of the checkpoint, or 1 when asked.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_swapped(trainer, pl_module)
        parts = self._collect(trainer, pl_module)
        if trainer.state.fn == "fit" and self.clock.total is not None:
            parts.set_blend(self.now.blend)
        if self.evaluate_ternary:
            self._put_back = parts.lend_blend(1.0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()
        self._put_back = _nothing

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        late_build.unwatch(pl_module, self._owner)
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        late_build.unwatch(pl_module, self._owner)
        self._let_go()

    # While training: lambda, loss scale, balance, logs.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.start_with(trainer, self.state_key if not self._restored else None)
        self.clock.make_plan(trainer, self.plan, self.total_steps, self.replan)
        self._let_go()
        self._parts = self._collect(trainer, pl_module)
        self._parts.set_blend(self.now.blend)
        if self.plan.angle_warmup:
            self._handles = training.scale_angle_steps(
                trainer.strategy.optimizers, lambda: self.now.angle_factor
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training.warn_unfinished(self.clock, self.now.blend)

    @property
    def now(self) -> PlanState:
        """What the plan says for the next optimizer step.

        Raises:
            ConfigError: The plan is in fractions and the training has not begun.
        """
        return plan_at(self.clock.step, self.clock.total, self.plan)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> training.Parts:
        own = [layer for _, layer in self._swapper.layers(pl_module)]
        copies = guards.averaged_copies(trainer)
        return training.Parts.of(own, [x for copy in copies for _, x in self._swapper.layers(copy)])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._parts is not None:
            self._parts.set_blend(self.now.blend)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._parts is not None and self._parts.own_losses:
            self._parts.set_loss_scale(training.root_loss_scale(trainer))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        blend = self.now.blend
        if self._parts is None or not self.clock.tick(trainer.global_step):
            return
        self._parts.synchronise_loads(trainer)
        self._log(trainer, pl_module, "blend", blend)
        self._log(trainer, pl_module, "load_max_over_mean", self._parts.load_imbalance())
        self._parts.update_balance()
        self._parts.set_blend(self.now.blend)  # what a checkpoint saved now shall hold

    def _log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        name: str,
        value: float | Tensor | None,
    ) -> None:
        full = f"bfmoe/{name}" if self.name is None else f"bfmoe/{self.name}/{name}"
        if value is not None and training.somebody_reads(trainer, full):
            pl_module.log(full, torch.as_tensor(value))

    # State: plain data, so that `torch.load(weights_only=True)` reads it.

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "name": self.name,
            "plan": self.plan.to_dict(),
            **self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"the callback's state has version {_STATE_VERSION}",
                got=state_dict.get("version"),
                fix="Resume with the library version that wrote the checkpoint.",
            )
        if (stored := state_dict["plan"]) != self.plan.to_dict():
            rank_zero_warn(f"The checkpoint was trained with {stored}; going on with {self.plan}.")
        self.clock.load_state_dict(state_dict)
        self._restored = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to modules and optimizers behind when copied or pickled."""
        return {**self.__dict__, "_handles": [], "_parts": None, "_put_back": _nothing}

    @property
    def _owner(self) -> str:
        return self._swapper.owner

    def _let_go(self) -> None:
        self._put_back()
        self._parts, self._put_back = None, _nothing
        while self._handles:
            self._handles.pop().remove()


def _nothing() -> None:
    """What there is to put back outside of an evaluation."""
