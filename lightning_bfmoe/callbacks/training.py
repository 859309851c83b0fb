"""What happens to optimizers and losses: parameter groups, angle warm-up, loss scale, balance."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.layers import TopKRouter, parameter_roles, routers
from lightning_bfmoe.plan import GROUP_KEY, split_parameter_groups


def split_groups(trainer: pl.Trainer, module: nn.Module, angle_lr_factor: float) -> int:
    """Split the groups of all the Trainer's optimizers; returns the number of groups added."""
    names = parameter_roles(module)
    parameters = dict(module.named_parameters())
    roles: dict[Tensor, str] = {p: names[n] for n, p in parameters.items() if n in names}
    added = 0
    for optimizer in trainer.strategy.optimizers:
        configs = trainer.strategy.lr_scheduler_configs
        theirs = [c.scheduler for c in configs if c.scheduler.optimizer is optimizer]
        added += split_parameter_groups(optimizer, roles, angle_lr_factor, schedulers=theirs)
    return added


def scale_angle_steps(
    optimizers: Iterable[Optimizer], factor: Callable[[], float]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Multiply the angles' learning rate during each optimizer step; schedulers never see it.

    Args:
        optimizers: Those whose groups `split_parameter_groups` has split.
        factor: Read at each step.

    Returns:
        Handles; `remove()` them when the training ends.
    """
    handles = []
    for optimizer in optimizers:
        kept: list[tuple[dict[str, Any], Any]] = []

        def before(optimizer: Optimizer, *_: Any, kept: list = kept) -> None:
            for group in optimizer.param_groups:
                if group.get(GROUP_KEY) == "angle":
                    kept.append((group, group["lr"]))
                    group["lr"] = group["lr"] * factor()

        def after(optimizer: Optimizer, *_: Any, kept: list = kept) -> None:
            for group, rate in kept:
                group["lr"] = rate
            kept.clear()

        handles += [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
    return handles


def root_loss_scale(trainer: pl.Trainer) -> float:
    """By what the user's loss is multiplied before its backward pass.

    Automatic optimisation divides it by the accumulated batches (manual optimisation leaves that
    to the user), and a GradScaler multiplies it.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
    automatic = trainer.lightning_module.automatic_optimization
    return scale / trainer.accumulate_grad_batches if automatic else scale


@dataclass(frozen=True)
class Parts:
    """The modules that a training step touches, looked up once: walking a model takes time."""

    layers: list[Any]
    """Swapped layers, and their twins in averaged copies of the model."""
    routers: list[TopKRouter]
    own_losses: bool
    """Whether a router adds a loss of its own."""

    @classmethod
    def of(cls, layers: list[Any], twins: list[Any]) -> "Parts":
        """The parts of a training, from the model's layers and those of averaged copies."""
        found = [router for layer in layers for _, router in routers(layer)]
        own_losses = any(r.switch_weight > 0 or r.z_weight > 0 for r in found)
        return cls([*layers, *twins], found, own_losses)

    def set_blend(self, value: float) -> None:
        """Set lambda of all layers."""
        for layer in self.layers:
            layer.set_blend(value)

    def lend_blend(self, value: float) -> Callable[[], None]:
        """Set lambda of all layers; returns what puts back the present ones."""
        before = [(layer, layer.blend) for layer in self.layers]
        self.set_blend(value)

        def put_back() -> None:
            for layer, blend in before:
                layer.set_blend(blend)

        return put_back

    def set_loss_scale(self, value: float) -> None:
        """Scale the routers' own losses like the user's."""
        for router in self.routers:
            router.set_loss_scale(value)

    def synchronise_loads(self, trainer: pl.Trainer) -> None:
        """Sum the loads over all processes, in one call, so that every rank moves alike."""
        loads = [router.pending_load for router in self.routers]
        if trainer.world_size > 1 and loads:
            total = trainer.strategy.reduce(torch.cat(loads), reduce_op="sum")
            for load, part in zip(loads, total.split([len(x) for x in loads]), strict=True):
                load.copy_(part)

    def update_balance(self) -> None:
        """Move every balance bias once."""
        for router in self.routers:
            router.update_balance()

    def load_imbalance(self) -> Tensor | None:
        """Load of the fullest expert over the mean, averaged over layers; 1 is perfect."""
        loads = [router.pending_load for router in self.routers]
        ratios = [load.max() / load.float().mean().clamp(min=1e-9) for load in loads]
        return torch.stack(ratios).mean() if ratios else None


def somebody_reads(trainer: pl.Trainer, name: str) -> bool:
    """Whether a logged value gets anywhere: to a logger, or to a callback that monitors it."""
    if trainer.barebones:
        return False
    monitors = (getattr(c, "monitor", None) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(trainer.loggers) or name in monitors


def warn_unfinished(clock: StepClock, blend: float) -> None:
    """Say that a training ended before its weights were ternary, and what to do about it."""
    if blend < 1:
        rank_zero_warn(
            f"The training ended at lambda {blend:.3f}, after {clock.step} of {clock.total} "
            "planned steps: the weights are not ternary yet and pack() refuses them. Train on, or "
            "give ButterflyMoECallback(total_steps=...) the optimizer steps that this training "
            "takes (with manual optimisation they cannot be foreseen).",
            stacklevel=2,
        )
