"""Which parameters are trainable, and noticing a change that plain DDP would not."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_bfmoe.errors import ReplicaError


class TrainableSet:
    """`requires_grad` of all parameters, as it was when the model was wrapped.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> watched = TrainableSet(layer)
        >>> _ = layer.bias.requires_grad_(False)
        >>> watched.changed()
        ['bias']

    Args:
        module: Whose parameters are listed once; those that are added later are not seen.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        self._parameters = [parameter for _, parameter in named]
        self.flags = {name: parameter.requires_grad for name, parameter in named}
        self._flags = list(self.flags.values())

    def changed(self) -> list[str]:
        """Names of the parameters that are otherwise now; asked before every step."""
        now = [p.requires_grad for p in self._parameters]
        if now == self._flags:
            return []
        pairs = zip(self.flags.items(), now, strict=True)
        return [name for (name, before), after in pairs if before != after]


def watch_wrapped(trainer: pl.Trainer, module: nn.Module) -> TrainableSet | None:
    """The trainable set that plain DDP has wrapped; None where nobody can part from the others.

    One process has no others, `ButterflyMoEStrategy` follows a change, FSDP2 reads the flags anew.
    """
    strategy: Any = trainer.strategy
    follows = getattr(strategy, "swaps_in_main_process", False)
    plain = isinstance(strategy, DDPStrategy) and not follows and trainer.world_size > 1
    return TrainableSet(module) if plain else None


def check_wrapped(wrapped: TrainableSet | None) -> None:
    """Raise when the trainable set is no longer the one that DDP has wrapped.

    Raises:
        ReplicaError: Parameters were frozen or thawed: their gradients would not be averaged, and
            the processes would train different models without an error.
    """
    changed = [] if wrapped is None else wrapped.changed()
    if changed:
        raise ReplicaError(
            "under plain DDP requires_grad stays as it was when the model was wrapped",
            got=f"a change of {len(changed)} parameters ({', '.join(changed[:4])})",
            fix="Use strategy='bfmoe', which wraps anew, or Plan(freeze_latents=...), which needs "
            "no change.",
        )
