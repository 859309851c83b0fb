"""Callbacks that drive layers, alone or as parts of another one; each layer has one driver a kind.

`ButterflyMoECallback` holds a `TernarySchedule`, an `AngleWarmup` and a `RouterBalance` in its
`parts` and forwards the hooks.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import moe_layers


class Part(pl.Callback):
    """A callback that drives the layers it finds; all of the module unless a holder says which."""

    name: str | None = None
    """Tells several callbacks of one kind apart, in checkpoints and in logged names."""
    holder: pl.Callback | None = None
    """The callback that forwards the hooks; None for one that the Trainer calls itself."""

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        if self.holder is not None:
            return self.holder.state_key
        return self._generate_state_key(name=self.name)

    def find(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """The layers to drive, with their paths: all of ours, or the holder's own."""
        find = moe_layers if self.holder is None else self.holder.find  # type: ignore[attr-defined]
        return find(module)

    def layers(self, module: nn.Module) -> list[Any]:
        """The layers to drive."""
        return [layer for _, layer in self.find(module)]

    def check_alone(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """There are layers, and no other callback drives them in the same way.

        Raises:
            ConfigError: No layer is found, or another callback of the Trainer drives one of them.
        """
        ours, own = {id(layer): path for path, layer in self.find(module)}, self.shown
        if not ours:
            raise ConfigError(
                f"{type(own).__name__} needs ButterflyMoE layers in the module",
                got="a module without any",
                fix="Call swap_feed_forward(module, ...) before, or use ButterflyMoECallback, "
                "which swaps.",
            )
        for other in self.others(trainer):
            shared = [path for path, layer in other.find(module) if id(layer) in ours]
            if shared:
                names = f"{type(own).__name__} and {type(other.shown).__name__}"
                raise ConfigError(
                    f"each layer has one {type(self).__name__}",
                    got=f"{names}, both for {shared[0]}",
                    fix="ButterflyMoECallback does all that TernarySchedule, AngleWarmup and "
                    "RouterBalance do: give it plan= and angle_lr_factor= and take the others "
                    "out, or swap by hand and use them without it.",
                )

    def others(self, trainer: pl.Trainer) -> Iterable[Any]:
        """The parts of this kind of all other callbacks, in their order."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for part in (callback, *getattr(callback, "parts", ())):
                if isinstance(part, type(self)) and part is not self:
                    yield part

    @property
    def shown(self) -> pl.Callback:
        """What the user has put into the Trainer."""
        return self if self.holder is None else self.holder
