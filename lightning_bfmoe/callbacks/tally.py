"""Loads of the experts and mean loss since the last record, over micro-batches and ranks."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bfmoe.callbacks.recording import gather_ranks
from lightning_bfmoe.callbacks.usage import _Counter
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE


class Tally:
    """Counts token slots by hooks on the layers, and adds up losses, until it is cleared."""

    def __init__(self) -> None:
        self._counters: list[_Counter] = []
        self._handles: list[Any] = []
        self._sum: Tensor | float = 0.0
        self._batches = 0

    def attach(self, layers: Mapping[str, ButterflyMoE | ButterflyExperts]) -> None:
        """Begin with these layers, by path."""
        self.detach()
        for name, layer in layers.items():
            counter = _Counter(name, layer)
            self._handles.append(layer.register_forward_hook(counter.record, with_kwargs=True))
            self._counters.append(counter)

    def detach(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()
        self._counters = []

    def switch(self, active: bool) -> None:
        """Whether forward passes count now."""
        for counter in self._counters:
            counter.active = active

    def add_loss(self, loss: Tensor | None) -> None:
        """Add the loss of a batch, 0-d; it stays on its device."""
        if loss is not None:
            self._sum, self._batches = self._sum + loss, self._batches + 1

    def clear(self) -> None:
        """Begin at zero."""
        self._sum, self._batches = 0.0, 0
        for counter in self._counters:
            counter.load.zero_()

    def reduced(self, trainer: pl.Trainer) -> tuple[dict[str, Tensor], float, int]:
        """Loads by layer, sum of the losses and their count, over all ranks by one collective."""
        loads = [counter.load for counter in self._counters]
        names = [counter.name for counter in self._counters]
        if trainer.world_size == 1:
            copies = [load.cpu().clone() for load in loads]
            return dict(zip(names, copies, strict=True)), float(self._sum), self._batches
        device = loads[0].device if loads else trainer.strategy.root_device
        loss = torch.as_tensor(self._sum, dtype=torch.float64, device=device).reshape(1)
        count = torch.full((1,), self._batches, dtype=torch.float64, device=device)
        own = torch.cat([*(load.double() for load in loads), loss, count])
        parts = gather_ranks(trainer, own).sum(dim=0).cpu().split([*map(len, loads), 1, 1])
        totals = [part.long() for part in parts[:-2]]
        return dict(zip(names, totals, strict=True)), parts[-2].item(), int(parts[-1])

    def take(self, trainer: pl.Trainer) -> tuple[dict[str, Tensor], float]:
        """Loads by layer and the mean loss (NaN when there was none); then begin at zero."""
        loads, total, batches = self.reduced(trainer)
        self.clear()
        return loads, total / batches if batches else math.nan

    def state_dict(self) -> dict[str, Any]:
        """This rank's counts, plain data."""
        loads = {counter.name: counter.load.tolist() for counter in self._counters}
        return {"loads": loads, "loss": [float(self._sum), self._batches]}

    def reduced_state(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The counts of all ranks, plain data; called on every rank."""
        loads, total, batches = self.reduced(trainer)
        named = {name: load.tolist() for name, load in loads.items()}
        return {"loads": named, "loss": [total, batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved counts; a layer that does not fit begins at zero."""
        for counter in self._counters:
            counter.load_list(state["loads"].get(counter.name, []))
        self._sum, self._batches = state["loss"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks and the layers behind when copied or pickled."""
        return {**self.__dict__, "_handles": [], "_counters": []}
