r"""Dropping experts of trained layers until they fit a budget.

What an expert is worth is measured on tokens that the layer really gets: the layer runs without it,
its tokens go to the next best expert, and the output changes by

.. math:: e = E|y - y'|^2 / E|y|^2 .
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate.batches import Batches
from lightning_bfmoe.calibrate.knapsack import Option, choose, parse_bytes
from lightning_bfmoe.calibrate.observe import observe
from lightning_bfmoe.calibrate.settings import Calibration
from lightning_bfmoe.errors import CalibrationError, ConfigError
from lightning_bfmoe.layers import ButterflyMoE, moe_layers
from lightning_bfmoe.layers.pruning import keep_experts_, packed_bytes

_SAMPLE, _A_BATCH = 1024, 128
_SHARE = 8  # of the experts that are left, at most one in so many goes before all are judged anew


@dataclass
class Pruned:
    """One layer.

    Args:
        path: Of the layer.
        experts: Before (count).
        kept: Experts that stay, by their old numbers.
        error: E|y - y'|^2 / E|y|^2 with those.
        size_before: Packed bytes.
        size_after: Packed bytes.
    """

    path: str
    experts: int
    kept: list[int]
    error: float
    size_before: int
    size_after: int


@dataclass
class PruneReport:
    """What `prune_experts` dropped; `print` it for a table."""

    layers: list[Pruned] = field(default_factory=list)

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Experts kept", box=SIMPLE_HEAD)
        for name in ("layer", "experts", "packed KB", "error"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for row in self.layers:
            sizes = f"{row.size_before / 1e3:.4g} > {row.size_after / 1e3:.4g}"
            count = f"{row.experts} > {len(row.kept)}"
            table.add_row(row.path, count, sizes, f"{row.error:.4f}")
        out = io.StringIO()
        Console(file=out, force_jupyter=False, width=100).print(table)
        return out.getvalue().rstrip("\n")


def prune_experts(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: str | int | None = None,
    keep: int | None = None,
    calibration: Calibration | None = None,
) -> PruneReport:
    """Drops experts of all `ButterflyMoE` layers of a model, those that change its output least.

    In each layer experts go one after another (in larger layers an eighth at a time) and the rest
    is judged anew; under a budget an exact knapsack says how many stay in which layer. Kept experts
    are bit-equal; a layer never keeps fewer than its top_k. Without a change of the routing the
    model must be given, not its optimizer: build that afterwards.

    Example:
        >>> model = nn.Sequential(ButterflyMoE(8, 16, num_experts=4, top_k=1))
        >>> data = [torch.randn(32, 8) for _ in range(2)]
        >>> report = prune_experts(model, data, keep=2)
        >>> len(report.layers[0].kept), model[0].router.num_experts
        (2, 2)

    Args:
        model: Changed in place; untouched if anything is raised.
        data: Batches, as for `calibrated_swap`.
        budget: Bytes that all layers together may take when packed (1.6-bit trits, fp16 angles):
            "2MB" or a number.
        keep: Experts that each layer keeps (count), instead of a budget.
        calibration: `max_batches`, `forward_fn` and `mask_fn` are read.

    Raises:
        ConfigError: Neither or both of budget and keep, or a packed layer.
        CalibrationError: No layer, a layer that gets no token, or a budget that is too small.
    """
    settings = calibration or Calibration()
    if (budget is None) == (keep is None):
        raise ConfigError(
            "experts are pruned to a budget or to a count",
            got=f"budget={budget!r}, keep={keep!r}",
            fix="Write budget='2MB', or keep=16.",
        )
    layers = {path: m for path, m in moe_layers(model) if isinstance(m, ButterflyMoE)}
    if not layers:
        raise CalibrationError(
            "a model whose experts are pruned has ButterflyMoE layers with a router of their own",
            got="none",
            fix="Swap and train it first.",
        )
    for path, layer in layers.items():
        if keep is not None and not layer.router.top_k <= keep <= layer.router.num_experts:
            raise ConfigError(
                f"keep lies between top_k={layer.router.top_k} and the {layer.router.num_experts} "
                f"experts of {path!r}",
                got=f"keep={keep}",
                fix="Use a number in that range.",
            )
    limit = None if budget is None else parse_bytes(budget)
    samples = _samples(model, list(layers), data, settings)
    paths, courses = [], []
    for path, layer in layers.items():
        least = layer.router.top_k if keep is None else keep
        paths.append(path)
        courses.append(removal_course(layer, samples[path], least))
    if limit is None:
        picks = [len(course) - 1 for course in courses]
    else:
        groups = [
            [Option(str(len(k)), packed_bytes(layers[p], len(k)), error) for k, error in course]
            for p, course in zip(paths, courses, strict=True)
        ]
        picks = choose(groups, limit)
    report = PruneReport()
    for path, course, pick in zip(paths, courses, picks, strict=True):
        layer, (kept, error) = layers[path], course[pick]
        count = layer.router.num_experts
        before, after = (packed_bytes(layer, n) for n in (count, len(kept)))
        keep_experts_(layer, kept)
        report.layers.append(Pruned(path, count, kept, error, before, after))
    return report


def _samples(
    model: nn.Module, paths: list[str], data: Iterable[Any], settings: Calibration
) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}

    def watcher(path: str) -> Any:
        def watch(rows: Tensor, held: bool) -> None:
            room = _SAMPLE - sum(map(len, kept[path]))
            if room > 0:
                step = max(1, len(rows) // _A_BATCH)
                kept[path].append(rows[::step][:room].clone())

        return watch

    batches = Batches(data, max_batches=settings.max_batches, held_out=0.5)
    feed: dict[str, Any] = {"forward_fn": settings.forward_fn, "mask_fn": settings.mask_fn}
    observe(model, batches, {path: watcher(path) for path in paths}, **feed)
    return {path: torch.cat(rows) for path, rows in kept.items()}


@torch.no_grad()
def removal_course(layer: ButterflyMoE, rows: Tensor, least: int) -> list[tuple[list[int], float]]:
    """Ever fewer experts of a layer, with the error of each choice; the layer is left as it was.

    Args:
        layer: In any mode; judged in eval mode.
        rows: Tokens that it gets, (tokens, d_model).
        least: Experts at the end.

    Returns:
        (kept experts, error) from all experts to `least` of them.
    """
    training, bias = layer.training, layer.router.balance_bias
    before, record = bias.clone(), layer.last_routing
    layer.eval()
    try:
        wanted = layer(rows).double()
        size = float(wanted.square().sum().clamp(min=1e-300))

        def error(gone: set[int]) -> float:
            bias.copy_(before)
            bias[list(gone)] = -math.inf  # never chosen
            return float((layer(rows).double() - wanted).square().sum()) / size

        left, gone = list(range(len(before))), set[int]()
        course = [(list(left), 0.0)]
        while len(left) > least:
            errors = {i: error(gone | {i}) for i in left}
            order = sorted(left, key=lambda i: (errors[i], i))
            for i in order[: max(1, min(len(left) // _SHARE, len(left) - least))]:
                gone.add(i)
                left.remove(i)
            course.append((list(left), error(gone)))
        return course
    finally:
        bias.copy_(before)
        layer.train(training)
        layer.last_routing = record
