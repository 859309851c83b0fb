"""`calibrated_swap`: joins `swap` (which blocks, and where they stand) with `calibrate` (how)."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_bfmoe.calibrate import Calibration, Dense, Job, calibrate_layers
from lightning_bfmoe.calibrate.feed_forward import check_settings
from lightning_bfmoe.calibrate.park import Parked
from lightning_bfmoe.calibrate.settings import moment_bytes
from lightning_bfmoe.calibrate.width import LossFn
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError, SwapError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.surgery import Replaced, ReplacementPlan
from lightning_bfmoe.narrowing import narrow
from lightning_bfmoe.swap.build import build_layer, measure
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.find import find_feed_forward
from lightning_bfmoe.swap.losses import warn_of_losses
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.report import SwapReport, skipped_rows
from lightning_bfmoe.swap.select import Patterns, select_candidates
from lightning_bfmoe.swap.swap import describe_block, install, plan_entry

Layer = ButterflyMoE | ButterflyExperts


@torch.inference_mode(False)  # inference tensors could not be trained
def calibrated_swap(
    model: nn.Module,
    data: Iterable[Any],
    config: ButterflyMoEConfig | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Calibration | None = None,
    width: int | float | None = None,
    loss_fn: LossFn | None = None,
    **overrides: Any,
) -> SwapReport:
    """Like `swap_feed_forward`, but the ternary layers are fitted to what the model really sees.

    The model runs over some batches without gradients; means and second moments of each block's
    inputs and hidden units, nothing else, are kept; closed forms then set shared matrices, base
    angles and biases (`docs/decisions.md` has the recipe's measurements). The latents lie on the
    ternary grid, so lambda 0 and 1 give the same function.

    Until all layers are ready the model is only run (``sequential=True`` puts finished layers in as
    it goes and takes them out again on any exception), so an interrupted call changes nothing.
    Blocks with a router of their own (experts of a mixture-of-experts model) are swapped without
    calibration, with a warning.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> data = [torch.randn(64, 8) for _ in range(5)]
        >>> report = calibrated_swap(model, data, calibration=Calibration(progress=False))
        >>> [(b.path, b.tokens, b.held_tokens) for b in report.calibration.blocks]
        [('0', 256, 64)]

    Args:
        model: Any module; it stays on its device.
        data: A dataloader, any iterable of batches, or a datamodule (its training loader).
        config: Settings of the layers.
        include: Paths or patterns of the blocks to swap, see `swap_feed_forward`.
        exclude: Paths or patterns to leave alone.
        calibration: How many batches, how they are fed, memory, order; defaults when None.
        width: Hidden units that each block keeps, a number or a share of them, chosen before it is
            rounded (`calibrate.width`); all when None. A power of two saves stages and padding.
        loss_fn: ``(model, batch)`` to a scalar: hidden units are scored by what the loss would rise
            without them (one backward pass a batch); None: by the size of what they add.
        **overrides: Fields of `ButterflyMoEConfig` that differ from `config`.

    Returns:
        The swap's report, for `restore` and checkpoints; `calibration` in it holds the choices.

    Raises:
        SwapError: Nothing matches, or a chosen block cannot be swapped.
        ConfigError: A setting is out of range or unknown.
        CalibrationError: The model does not take a batch, activations are not finite, a block never
            ran, or settings do not go with a calibration.
    """
    config = ButterflyMoEConfig.from_dict(
        {**(config or ButterflyMoEConfig()).to_dict(), **overrides}
    )
    settings = calibration or Calibration()
    if width is None and loss_fn is not None:
        raise ConfigError(
            "loss_fn scores the hidden units that width= keeps",
            got="loss_fn without width",
            fix="Write width=0.75, or leave loss_fn out.",
        )
    narrowing = None if width is None else (width, loss_fn)
    return swap_calibrated(model, data, config, include, exclude, settings, {}, narrowing)


def swap_calibrated(
    model: nn.Module,
    data: Iterable[Any],
    config: ButterflyMoEConfig,
    include: Patterns,
    exclude: Patterns,
    settings: Calibration,
    layers: Mapping[str, tuple[Layer, ReplacementPlan]],
    narrowing: tuple[int | float, LossFn | None] | None = None,
) -> SwapReport:
    """The swap behind `calibrated_swap`.

    Args:
        model: Any module.
        data: Batches.
        config: Settings of new layers.
        include: Patterns.
        exclude: Patterns.
        settings: Of the calibration.
        layers: By path: layers that are filled instead of built, with their placements.
        narrowing: Width and loss of `narrowing.narrow`.
    """
    check_settings(config)
    with keep_rng():
        candidates = find_feed_forward(model)
        chosen = select_candidates(model, candidates, include, exclude)
        if layers and {c.path for c in chosen} != set(layers):
            raise SwapError(
                "layers are filled in the model that they were prepared for",
                got=f"blocks {sorted({c.path for c in chosen} ^ set(layers))[:3]} found once only",
                fix="Change nothing in the model between prepare_swap and fill_swapped.",
            )
        left = skipped_rows(c for c in candidates if not any(c is taken for taken in chosen))
        report = SwapReport(skipped=left)
        plain = [c for c in chosen if c.experts]
        if plain:
            warnings.warn(
                f"{len(plain)} expert blocks with a router of their own (first: {plain[0].path!r}) "
                "are swapped without calibration.",
                stacklevel=3,
            )
        fitting = [c for c in chosen if not c.experts]
        course = Course(model, settings.sequential, config, layers)
        course.functions = {c.path: c.block for c in fitting}
        if narrowing is not None:
            data = narrow(model, fitting, narrowing[0], data, settings, narrowing[1])
        try:
            jobs = [course.job(c) for c in fitting]
            if jobs:
                report.calibration = calibrate_layers(model, jobs, data, settings)
            others = {c.path: course.build(c) for c in plain}
            fits = {b.path: b for b in report.calibration.blocks} if jobs else {}
            for c in chosen:
                row = describe_block(c, config, bias=None if c.experts else True)
                if c.experts:
                    layer, row.expert_error = others[c.path]
                    row.relative_error = measure(c, layer)
                else:
                    row.relative_error = fits[c.path].error ** 0.5
                report.blocks.append(row)
                if not layers:  # else it was told when they were put in
                    warn_of_losses(c)
            course.finish([(c, others[c.path][0]) for c in plain])
        except BaseException:
            course.undo()
            raise
    report.receipts = course.receipts
    report.placements = [plan_entry(layer) for layer, _ in course.receipts]
    return report


class Course:
    """The new layers on their way into the model, and the way back.

    Args:
        model: The root.
        sequential: Put each layer in as soon as it is done.
        config: Settings of new layers.
        layers: Layers that are there already, with their placements, by path.
    """

    def __init__(
        self,
        model: nn.Module,
        sequential: bool,
        config: ButterflyMoEConfig,
        layers: Mapping[str, tuple[Layer, ReplacementPlan]],
    ) -> None:
        self.model, self.sequential, self.config = model, sequential, config
        self.layers = layers
        self.functions: dict[str, Any] = {}  # the blocks before any of them was narrowed
        self.waiting: list[tuple[Candidate, Layer | Parked]] = []
        self.receipts: list[tuple[Layer, Replaced]] = []

    def build(self, c: Candidate) -> tuple[Layer, float | None]:
        """The layer that stands for a candidate: a given one, else a new one."""
        if c.path not in self.layers:
            return build_layer(c, self.config, bias=None if c.experts else True)
        layer, placement = self.layers[c.path]
        assert c.placement is not None
        c.placement["layer"] = dict(placement.get("layer", {}))
        return layer, None

    def job(self, c: Candidate, done: Callable[[Candidate, Layer], Any] | None = None) -> Job:
        """The candidate as `calibrate` sees it; `done` takes the layer instead of the course."""
        take = done or self.done
        block = c.block
        assert block is not None
        sizes = {
            "d_model": block.d_model,
            "d_ff": block.d_ff,
            "d_out": block.d_out,
            "gated": block.gated,
            "correction_rank": self.config.correction_rank,
        }
        dense = Dense(
            up=block.up,
            down=block.down,
            gate=block.gate,
            up_bias=block.up_bias,
            gate_bias=block.gate_bias,
            function=self.functions.get(c.path, block),
        )
        return Job(
            c.path,
            dense,
            lambda: self.build(c)[0],
            moment_bytes(sizes),
            lambda layer: take(c, layer),
        )

    def done(self, c: Candidate, layer: Layer) -> None:
        """Take a fitted layer."""
        if self.sequential:
            self.put(c, layer)
        else:  # a given layer holds its memory anyway
            self.waiting.append((c, layer if c.path in self.layers else Parked(layer)))

    def put(self, c: Candidate, layer: Layer) -> None:
        """Put a layer into its slot."""
        assert c.placement is not None
        layer.train(c.module.training)
        self.receipts += install(self.model, [(c.placement, layer)])

    def finish(self, others: list[tuple[Candidate, Layer]]) -> None:
        """Put in all that is not in yet."""
        for c, layer in self.waiting:
            self.put(c, layer.unpark() if isinstance(layer, Parked) else layer)
        self.waiting.clear()
        for c, other in others:
            self.put(c, other)

    def undo(self) -> None:
        """The model as it was."""
        for layer, receipt in reversed(self.receipts):
            receipt.revert()
            layer.placement = None
        self.receipts.clear()
