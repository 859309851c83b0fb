"""Checks of what the Trainer brings: order of callbacks, strategy, optimizers."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import moe_layers

# Callbacks that copy or collect modules in their own `setup`, so the swap must come first.
_AFTER_US = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning")

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
_REFUSED = {
    "DeepSpeedStrategy": "its engine owns the optimizer, whose groups could not be split later",
    "FSDPStrategy": "FSDP1 flattens parameters, so angles cannot have a group of their own",
    "XLAStrategy": "nobody has tried it with these layers",
    "SingleDeviceXLAStrategy": "nobody has tried it with these layers",
}
"""Class, or base class, of a strategy -> why it is refused."""


def check_order(trainer: pl.Trainer, ours: pl.Callback) -> None:
    """Callbacks that copy the model or collect its modules in `setup` stand behind ours.

    Raises:
        SwapError: One stands before.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback is ours:
            return
        names = {cls.__name__ for cls in type(callback).__mro__}
        if names & set(_AFTER_US):
            theirs, our_name = type(callback).__name__, type(ours).__name__
            raise SwapError(
                f"{our_name} must stand before {theirs}, which takes the modules it finds in setup",
                got=f"callbacks=[..., {theirs}, ..., {our_name}, ...]",
                fix=f"Write callbacks=[{our_name}(...), {theirs}(...)].",
            )


def check_strategy(trainer: pl.Trainer, module: nn.Module) -> None:
    """One device, DDP and FSDP2 (`ModelParallelStrategy`) are supported; all else is refused.

    By the names of the classes, since `pytorch_lightning` has classes of its own.

    Raises:
        SwapError: Another strategy; or one that spawns or forks, whose workers would swap and train
            while the caller's module, to which Lightning returns the weights, stays dense.
    """
    strategy = trainer.strategy
    name, kinds = type(strategy).__name__, [cls.__name__ for cls in type(strategy).__mro__]
    refused = [kind for kind in kinds if kind in _REFUSED]
    if refused or not _SUPPORTED & set(kinds):
        why = _REFUSED[refused[0]] if refused else "nobody has tried it with these layers"
        raise SwapError(
            "swapped layers train on one device, with DDP, or with FSDP2 (ModelParallelStrategy)",
            got=f"strategy {name}: {why}",
            fix="Use strategy='bfmoe', 'ddp' or 'auto'. Where the model is too large for one "
            "device, use ModelParallelStrategy: swap_feed_forward before fully_shard in "
            "configure_model.",
        )
    spawns = isinstance(strategy.launcher, _MultiProcessingLauncher)
    returns = getattr(strategy, "swaps_in_main_process", False)
    if spawns and not returns and next(moe_layers(module), None) is None:
        raise SwapError(
            "the processes that train are started from a swapped module",
            got=f"strategy {name}, which spawns or forks them",
            fix="Use strategy='bfmoe_ddp_spawn', 'bfmoe_ddp_fork' or 'bfmoe_ddp_notebook', which "
            "bring the result back; or strategy='ddp'; or swap_feed_forward(module, ...) before "
            "fit.",
        )


def check_optimizers(
    module: nn.Module,
    optimizers: Iterable[Optimizer],
    ours: Iterable[nn.Module],
    replaced: Mapping[str, Tensor],
) -> None:
    """The optimizers hold the new parameters and none that the swap took out.

    Args:
        module: The whole model.
        optimizers: Its optimizers; nothing is checked when they hold no parameters at all.
        ours: The swapped layers.
        replaced: Parameters that the swap took out and somebody still holds, by their old names.

    Raises:
        SwapError: An optimizer holds replaced parameters, or misses trainable ones of ours.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not held:
        return
    orphans = [name for name, p in replaced.items() if id(p) in held]
    new = {id(p) for layer in ours for p in layer.parameters() if p.requires_grad}
    missing = [n for n, p in module.named_parameters() if id(p) in new and id(p) not in held]
    if orphans:
        raise SwapError(
            "an optimizer must be built after the swap, from the parameters the model has then",
            got=f"an optimizer with {len(orphans)} parameters that are no longer in the model "
            f"({_list(orphans)}) and without {len(missing)} new ones ({_list(missing)})",
            fix="Build it in configure_optimizers from self.parameters(), not in __init__.",
        )
    if missing:
        raise SwapError(
            "every trainable parameter of a swapped layer must be in an optimizer",
            got=f"{len(missing)} that are in none ({_list(missing)})",
            fix="Collect self.parameters() in configure_optimizers; if these layers are not to be "
            "trained, freeze them with requires_grad_(False) or leave them out with exclude=.",
        )


def averaged_copies(trainer: pl.Trainer) -> list[nn.Module]:
    """Copies of the model that averaging callbacks keep; lambda must be set there too."""
    copies = [getattr(c, "_average_model", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    return [copy for copy in copies if isinstance(copy, nn.Module)]


def _list(names: list[Any], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more
