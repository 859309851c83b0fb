"""One look at a module: swap what can be swapped, remember what was refused, know our layers."""

import contextlib
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_bfmoe.callbacks.settings import differing_settings
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, moe_layers
from lightning_bfmoe.prepared import prepare_swap
from lightning_bfmoe.swap import SwapReport, swap_feed_forward

_MARK = "swapped_by"


class Swapper:
    """Swaps the same way in every stage, however often it is asked.

    Args:
        config: Settings of the layers.
        include: Patterns to take.
        exclude: Patterns to leave.
        owner: Mark on the layers, so that several swappers keep to their own.
        calibrates: Whether the layers are calibrated later: they get biases, and their originals
            wait in `held`.
    """

    def __init__(
        self,
        config: ButterflyMoEConfig,
        include: Any,
        exclude: Any,
        owner: str,
        calibrates: bool = False,
    ) -> None:
        self.config, self.include, self.exclude, self.owner = config, include, exclude, owner
        self.calibrates = calibrates
        self.held: SwapReport | None = None
        self._refusal: SwapError | None = None
        self._taken: MutableMapping[str, Tensor] = weakref.WeakValueDictionary()

    @property
    def replaced(self) -> dict[str, Tensor]:
        """Parameters that a swap took out and somebody else still holds, by their old names."""
        return dict(self._taken)

    def layers(self, module: nn.Module) -> Iterator[tuple[str, ButterflyMoE | ButterflyExperts]]:
        """This swapper's layers in a module, and those that nobody marked."""
        for name, layer in moe_layers(module):
            if getattr(layer, _MARK, self.owner) == self.owner:
                yield name, layer

    def set_blend(self, module: nn.Module, value: float) -> None:
        """Set lambda of these layers."""
        for _, layer in self.layers(module):
            layer.set_blend(value)

    def was_here(self, module: nn.Module) -> bool:
        """Whether the module holds layers that were swapped in before; they keep their settings."""
        found = [
            (name, layer)
            for name, layer in self.layers(module)
            if layer.placement is not None or hasattr(layer, _MARK)
        ]
        for name, layer in found:
            if isinstance(layer, ButterflyMoE) and (
                other := differing_settings(self.config, layer.settings)
            ):
                rank_zero_warn(
                    f"{name} was swapped before and keeps its settings: {', '.join(other)}. Build "
                    "the module anew for other ones."
                )
                break
        return bool(found)

    def swap(self, module: nn.Module) -> SwapReport | None:
        """Swap what is there by now.

        A refusal is kept for `check_found`, because layers may still be built.

        Returns:
            The report, without originals; None when nothing was swapped.
        """
        self._refusal = None
        before = dict(module.named_parameters())
        try:
            with torch.device("cpu"), plain_dtype():  # a Trainer may have set others
                swap = prepare_swap if self.calibrates else swap_feed_forward
                report = swap(module, self.config, include=self.include, exclude=self.exclude)
        except SwapError as error:
            self._refusal = error
            return None
        for layer, _ in report.receipts:
            setattr(layer, _MARK, self.owner)
        left = {id(p) for p in module.parameters()}
        if self.calibrates:
            held = self.held.receipts if self.held else []
            self.held = SwapReport(receipts=[*held, *report.receipts])
        report.release()
        for name, parameter in before.items():
            if id(parameter) not in left:
                self._taken[name] = parameter
        return report if report.blocks else None

    def check_found(self) -> None:
        """Raise what the last look refused.

        Raises:
            SwapError: Nothing matched, or a block cannot be swapped.
        """
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to parameters behind when copied or pickled."""
        return {**self.__dict__, "_taken": {}, "held": None}


def merge_reports(earlier: SwapReport, later: SwapReport) -> SwapReport:
    """The later report, with the blocks of the earlier one that it does not name again."""
    again = {block.path for block in later.blocks}
    later.blocks[:0] = [block for block in earlier.blocks if block.path not in again]
    later.placements[:0] = [place for place in earlier.placements if place["path"] not in again]
    return later


@contextlib.contextmanager
def plain_dtype() -> Iterator[None]:
    """Default dtype float32 for as long as the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
