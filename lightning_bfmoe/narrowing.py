"""Feed-forward blocks without their least important hidden units, before they are calibrated."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.calibrate.batches import Batches
from lightning_bfmoe.calibrate.observe import observe
from lightning_bfmoe.calibrate.progress import Progress
from lightning_bfmoe.calibrate.width import (
    Energies,
    LossFn,
    atomic_scores,
    gradient_moments,
    kept_units,
    resolve_width,
)
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.swap.blocks import FeedForward
from lightning_bfmoe.swap.candidate import Candidate


def narrow(
    model: nn.Module,
    candidates: list[Candidate],
    width: int | float,
    data: Iterable[Any],
    settings: Calibration,
    loss_fn: LossFn | None = None,
) -> Iterable[Any]:
    """Give each candidate the block of its best hidden units; the model is only run.

    Args:
        model: The root.
        candidates: Their `block` is replaced.
        width: Units that stay, a number or a share.
        data: Batches.
        settings: Of the calibration.
        loss_fn: ``(model, batch)`` to a scalar for scores by the loss (`calibrate.width`); None for
            scores by the size of what a unit adds.

    Returns:
        The data, to be read again.

    Raises:
        ConfigError: The width is out of range, or a block is not one module and scored by a loss.
        CalibrationError: The data or the loss does not fit.
    """
    batches = Batches(data, max_batches=settings.max_batches, held_out=settings.held_out)
    blocks: dict[str, FeedForward] = {c.path: c.block for c in candidates if c.block is not None}
    widths = {path: resolve_width(width, b.d_ff, path) for path, b in blocks.items()}
    energies = {p: Energies(b.hidden, b.d_ff, b.up.device) for p, b in blocks.items()}
    feed: dict[str, Any] = {"forward_fn": settings.forward_fn, "mask_fn": settings.mask_fn}
    gradients: dict[str, Tensor] = {}
    if loss_fn is not None:
        split = [c.path for c in candidates if c.layer_at or c.identities]
        if split:
            raise ConfigError(
                "a loss scores the hidden units of blocks that are one module each",
                got=f"{split[0]!r}, which is spread over several",
                fix="Use loss_fn=None, or leave it alone with exclude=.",
            )
    passes = 1 if loss_fn is None else 2
    with Progress(settings.progress, passes * len(batches), 0) as progress:
        watchers = {path: e.watch for path, e in energies.items()}
        observe(model, batches, watchers, on_batch=progress.batch, **feed)
        if loss_fn is not None:
            outputs = {path: b.d_out for path, b in blocks.items()}
            gradients = gradient_moments(
                model, outputs, batches, loss_fn,
                mask_fn=settings.mask_fn, on_batch=progress.batch,
            )  # fmt: skip
    for c in candidates:
        block = blocks[c.path]
        scores = atomic_scores(energies[c.path].mean(), block.down, gradients.get(c.path))
        c.block = narrowed(block, kept_units(scores, widths[c.path]))
    return batches.data


def narrowed(block: FeedForward, kept: Tensor) -> FeedForward:
    """The block with some of its hidden units.

    Example:
        >>> import torch
        >>> block = FeedForward(up=torch.ones(8, 4), down=torch.ones(4, 8), activation="relu")
        >>> narrowed(block, torch.tensor([0, 5])).d_ff
        2
    """
    return dataclasses.replace(
        block,
        up=block.up[kept],
        down=block.down[:, kept],
        gate=None if block.gate is None else block.gate[kept],
        up_bias=None if block.up_bias is None else block.up_bias[kept],
        gate_bias=None if block.gate_bias is None else block.gate_bias[kept],
    )
