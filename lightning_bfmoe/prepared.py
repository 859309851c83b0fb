"""A calibrated swap in two steps: layers first, their values later, in the same parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.calibrate.feed_forward import check_settings
from lightning_bfmoe.calibrated import Layer, swap_calibrated
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.layers.surgery import ReplacementPlan
from lightning_bfmoe.swap.build import build_layer
from lightning_bfmoe.swap.find import find_feed_forward
from lightning_bfmoe.swap.losses import warn_of_losses
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.report import SwapReport, skipped_rows
from lightning_bfmoe.swap.restore import restore
from lightning_bfmoe.swap.select import Patterns, select_candidates
from lightning_bfmoe.swap.swap import describe_block, install, plan_entry


@torch.inference_mode(False)
def prepare_swap(
    model: nn.Module,
    config: ButterflyMoEConfig,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
) -> SwapReport:
    """A plain swap for layers that `fill_swapped` calibrates later: they have biases, as those do.

    For where a model's parameters must stand before data can be read, as in a Trainer.

    Args:
        model: Any module.
        config: Settings of the layers.
        include: See `swap_feed_forward`.
        exclude: Likewise.

    Returns:
        The report; keep it, with its originals, for `fill_swapped` or `restore`.

    Raises:
        SwapError: Nothing matches, or a chosen block cannot be swapped; nothing was changed then.
        CalibrationError: Settings that do not go with a calibration.
    """
    check_settings(config)
    with keep_rng():
        candidates = find_feed_forward(model)
        chosen = select_candidates(model, candidates, include, exclude)
        report = SwapReport(
            skipped=skipped_rows(c for c in candidates if not any(c is t for t in chosen))
        )
        entries = []
        for c in chosen:
            bias = None if c.experts else True
            row = describe_block(c, config, bias=bias)
            layer, row.expert_error = build_layer(c, config, bias=bias)
            assert c.placement is not None
            entries.append((c.placement, layer))
            report.blocks.append(row)
            warn_of_losses(c)
        report.receipts = install(model, entries)
    report.placements = [plan_entry(layer) for layer, _ in report.receipts]
    return report


@torch.inference_mode(False)
def fill_swapped(
    model: nn.Module,
    report: SwapReport,
    data: Iterable[Any],
    config: ButterflyMoEConfig,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Calibration | None = None,
    on_restored: Callable[[], Any] | None = None,
) -> SwapReport:
    """Calibrates the layers of `prepare_swap` in place: the same modules, the same parameters.

    The originals go back into the model while it is run, and stay there if anything is raised.

    Args:
        model: The model that was prepared.
        report: Of `prepare_swap`; spent afterwards.
        data: As for `calibrated_swap`.
        config: As for `prepare_swap`, as are the two patterns.
        include: Patterns.
        exclude: Patterns.
        calibration: Settings; defaults when None.
        on_restored: Called when the originals are back, for instance to convert their dtype.

    Returns:
        A report like that of `calibrated_swap`.

    Raises:
        CalibrationError: See `calibrated_swap`.
    """
    layers = {entry["path"]: (layer, entry) for layer, entry in _placed(report)}
    restore(model, report)
    if on_restored is not None:
        on_restored()
    settings = calibration or Calibration()
    return swap_calibrated(model, data, config, include, exclude, settings, layers)


def _placed(report: SwapReport) -> list[tuple[Layer, ReplacementPlan]]:
    return [(layer, layer.placement) for layer, _ in report.receipts]  # type: ignore[misc]
