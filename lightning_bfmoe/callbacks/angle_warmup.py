"""`AngleWarmup`: the angles' own learning rate in the user's optimizers, and its phases."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.callbacks.planned import Planned
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import parameter_roles
from lightning_bfmoe.plan import (
    Plan,
    StepScale,
    check_factor,
    holds,
    scale_steps,
    split_parameter_groups,
)


class AngleWarmup(Planned):
    """Gives the angles of all ButterflyMoE layers a learning rate of their own, with phases.

    The optimizers of an unedited `configure_optimizers` are split into groups before the first
    step: no weight decay for angles, gains, routers and biases; each step of the angles is taken at
    the learning rate times `angle_lr_factor`. All factors hold during an optimizer step only, so
    schedulers, finders and checkpoints see the user's own learning rate.

    For models that were swapped with `swap_feed_forward`; `ButterflyMoECallback` holds one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AngleWarmup(5.0, warmup=100)], logger=False)

    Args:
        angle_lr_factor: Learning rate of the angles over that of the other parameters, > 0.
        warmup: Length of the linear warm-up of the angles (fraction of the training, or steps).
        freeze_latents: Length of a first phase in which the latent matrices stand still (fraction
            or steps).
        second_stage: Where BitNet's second stage begins (fraction or steps); None: never.
        second_lr_factor: Factor on every learning rate in the second stage.
        second_decay_factor: Factor on every weight decay in the second stage.
        total_steps: Optimizer steps of the whole training. None: the Trainer's estimate.
        replan: On resume, whether to plan anew when the Trainer's estimate has changed.
        name: Tells several callbacks apart, in checkpoints.

    Raises:
        ConfigError: A setting is out of range; when fitting, no layers, a second driver of them,
            or latents to freeze that have no group of their own.
    """

    def __init__(
        self,
        angle_lr_factor: float = 20.0,
        warmup: int | float = 0,
        *,
        freeze_latents: int | float = 0,
        second_stage: int | float | None = None,
        second_lr_factor: float = Plan.second_lr_factor,
        second_decay_factor: float = Plan.second_decay_factor,
        total_steps: int | None = None,
        replan: bool = False,
        name: str | None = None,
    ) -> None:
        plan = Plan(
            start=0,
            end=0,
            angle_warmup=warmup,
            freeze_latents=freeze_latents,
            second_stage=second_stage,
            second_lr_factor=second_lr_factor,
            second_decay_factor=second_decay_factor,
        )
        super().__init__(plan, total_steps, replan, name)
        self.angle_lr_factor = check_factor(angle_lr_factor)
        self._latents_apart: bool | None = None  # as in the checkpoint
        self._handles: list[StepScale] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._latents_apart = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_alone(trainer, pl_module)
        guards.check_optimizers(
            pl_module, trainer.strategy.optimizers, self.layers(pl_module), replaced={}
        )
        if self._latents_apart is None:
            self._latents_apart = self.plan.freeze_latents > 0
        roles = self._roles(pl_module)
        for optimizer in trainer.strategy.optimizers:
            configs = trainer.strategy.lr_scheduler_configs
            split_parameter_groups(
                optimizer,
                roles,
                self.angle_lr_factor,
                schedulers=[c.scheduler for c in configs if c.scheduler.optimizer is optimizer],
                latents_apart=self._latents_apart,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._let_go()
        roles = self._roles(pl_module)
        ours = [o for o in trainer.strategy.optimizers if _held(o) & {id(p) for p in roles}]
        if self.now.latent_factor < 1:
            _check_apart(ours, roles)
        if self.plan.second_stage is not None:
            self._check_one_stage(trainer, pl_module, ours)
        plan = self.plan
        if plan.angle_warmup or plan.freeze_latents or plan.second_stage is not None:
            rule = self._rule(frozenset(id(p) for p in roles))
            self._handles = [scale_steps(optimizer, rule) for optimizer in ours]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.count(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "latents_apart": bool(self._latents_apart)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._latents_apart = bool(state_dict.get("latents_apart", False))

    def _rule(self, ours: frozenset[int]) -> Any:
        def rule(group: dict[str, Any]) -> tuple[float, float]:
            now = self.now
            own = now.angle_factor if holds(group, "angle", ours) else 1.0
            own = now.latent_factor if holds(group, "latent", ours) else own
            return now.lr_factor * own, now.decay_factor

        return rule

    def _roles(self, module: nn.Module) -> dict[Tensor, str]:
        """Roles of the parameters of the layers that are driven here."""
        ours = {id(p) for layer in self.layers(module) for p in layer.parameters()}
        names = parameter_roles(module)
        return {p: names[n] for n, p in module.named_parameters() if id(p) in ours and n in names}

    def _check_one_stage(
        self, trainer: pl.Trainer, module: nn.Module, ours: list[Optimizer]
    ) -> None:
        theirs = [o for o in self.others(trainer) if o.plan.second_stage is not None]
        parameters = {id(p) for other in theirs for p in other._roles(module)}
        if any(_held(optimizer) & parameters for optimizer in ours):
            raise ConfigError(
                "the second stage is one of the whole optimizer, which has one callback for it",
                got=f"{len(theirs) + 1} callbacks with second_stage= and one optimizer",
                fix="Leave second_stage=None in all of them but one.",
            )

    def _let_go(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to optimizers behind when copied or pickled."""
        return {**self.__dict__, "_handles": []}


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _check_apart(optimizers: list[Optimizer], roles: dict[Tensor, str]) -> None:
    """Latents that are to stand still have a group of their own.

    Raises:
        ConfigError: An optimizer holds them together with others.
    """
    latents = frozenset(id(p) for p, role in roles.items() if role == "latent")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            mixed = any(id(p) in latents for p in group["params"])
            if mixed and not holds(group, "latent", latents):
                raise ConfigError(
                    "latents are frozen by the learning rate of a parameter group of their own",
                    got=f"{type(optimizer).__name__} that keeps them with other parameters",
                    fix="LBFGS knows one group only: use another optimizer. A checkpoint of a "
                    "training without freeze_latents has none: resume it with freeze_latents=0.",
                )
