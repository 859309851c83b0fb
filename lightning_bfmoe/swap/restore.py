"""The inverse of a swap: the very same original modules back in their slots."""

import torch
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.swap.report import SwapReport


def restore(model: nn.Module, report: SwapReport | None = None) -> None:
    """Puts back every module, function and setting that a swap took out, as they were.

    The originals are the same objects with the same weights, so the state_dict is bit-identical.
    They follow the model's present device and training flag.

    Example:
        >>> from lightning_bfmoe.swap import swap_feed_forward
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> first = model[0]
        >>> report = swap_feed_forward(model)
        >>> restore(model, report)
        >>> model[0] is first
        True

    Args:
        model: The swapped model, or a module around it.
        report: What `swap_feed_forward` returned; it holds the originals.

    Raises:
        SwapError: There is no report, it holds no originals (dry run, restored before, released,
            pickled, copied), or the model is not the one that was swapped.
    """
    if report is None:
        raise SwapError(
            "restore needs the report of the swap, which holds the originals",
            got="report=None",
            fix="Keep it: report = swap_feed_forward(model); restore(model, report).",
        )
    if not report.receipts:
        if not report.blocks and not report.dry_run:
            return  # that swap had nothing to do
        raise SwapError(
            "a report that restores must hold the original modules",
            got="a dry run's report"
            if report.dry_run
            else "none (restored, released, copied or loaded)",
            fix="Use the very object that swap_feed_forward returned, once; or rebuild the model.",
        )
    present = {id(module) for module in model.modules()}
    for layer, receipt in report.receipts:
        if not receipt.before:
            raise SwapError(
                "each receipt of a report restores once",
                got=f"one of {len(report.receipts)} that has been restored through another report",
                fix="Take the restored receipts out of report.receipts, or restore all at once.",
            )
        owner, name, _ = receipt.before[0]
        if id(owner) not in present or owner._modules.get(name) is not layer:
            raise SwapError(
                "restore works on the model that was swapped, its layers in place",
                got=f"slot {name!r} of a {type(owner).__name__} without the report's layer",
                fix="A deepcopy has no originals: restore the model first, then copy it.",
            )
    for layer, receipt in reversed(report.receipts):
        for _, _, original in receipt.before:
            if isinstance(original, nn.Module):
                _follow(original, layer)
        receipt.revert()
        layer.placement = None
    report.receipts.clear()


def _follow(original: nn.Module, layer: nn.Module) -> None:
    """Moves an original to where its replacement is now, and into its mode."""
    device = next(layer.parameters(), torch.zeros(())).device
    if any(p.device != device for p in original.parameters()):
        original.to(device)
    if original.training != layer.training:
        original.train(layer.training)
