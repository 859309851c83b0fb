"""`selected_swap`: of all submodules, which are replaced, and by what, under one budget."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.calibrate.feed_forward import check_settings
from lightning_bfmoe.calibrate.knapsack import parse_bytes
from lightning_bfmoe.calibrate.selection import SelectionReport, kind_of, rank_of
from lightning_bfmoe.calibrate.streams import Submodule
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import ButterflyMoE
from lightning_bfmoe.layers.bypass import LinearBypass, share_basis
from lightning_bfmoe.layers.correction import set_correction_
from lightning_bfmoe.layers.surgery import ReplacementPlan, Scalar, replacement
from lightning_bfmoe.selecting import OPTIONS, Search, correction_ranks
from lightning_bfmoe.swap.build import finish_layer
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.report import SwapReport
from lightning_bfmoe.swap.select import Patterns
from lightning_bfmoe.swap.swap import describe_block, install, plan_entry

_GROUP = "feed-forward"  # of the bypasses that share a basis


@torch.inference_mode(False)
def selected_swap(
    model: nn.Module,
    data: Iterable[Any],
    config: ButterflyMoEConfig | None = None,
    *,
    budget: str | int | None = None,
    sparsity: float | None = None,
    options: Sequence[str] = OPTIONS,
    attention: bool = True,
    rank: int | None = None,
    attention_rank: int | None = None,
    correction_rank: int | Sequence[int] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> SelectionReport:
    r"""Ranks all feed-forward and attention submodules and replaces those that matter least.

    Each submodule F is judged by the residual-stream error that a replacement G would make on
    held-out tokens (`calibrate.streams`), one at a time, and gets one option: `keep`; `butterfly`,
    a calibrated ButterflyMoE layer (feed-forward only); `corrected`, the same with a low-rank
    correction beside it (in the report ``butterfly+r`` with its rank r); `bypass`, a fitted
    low-rank linear map, with one basis for all feed-forward ones and an own one for attention; or
    `remove`, its mean output as a constant. The sum of the errors is minimised exactly under the
    budget (`calibrate.knapsack`). Errors are taken as if they added up, which they nearly do where
    they are small; look at the loss as well.

    Attention is found by the names of classes. One that adds the residual itself is taken apart
    where its parts can be told (BERT, MPNet), else kept (ALBERT), as is cross-attention; a causal
    model's first one is kept too: a generation cache counts its length by it. The report says so.

    It stands here and not in `swap_feed_forward`, because `swap` and `calibrate` are wings that do
    not import one another.

    Example:
        >>> from lightning_bfmoe.calibrate import Calibration
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(
        ...     nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
        >>> data = [torch.randn(64, 8) for _ in range(5)]
        >>> report = selected_swap(model, data, budget="1KB", options=("keep", "bypass", "remove"),
        ...     rank=4, calibration=Calibration(progress=False))
        >>> [(row.path, row.chosen) for row in report.submodules]
        [('1', 'bypass')]

    Args:
        model: Any module; it stays on its device.
        data: As for `calibrated_swap`.
        config: Settings of ButterflyMoE layers.
        budget: Bytes that all ranked submodules may take afterwards: "40MB" (10^6), "40MiB" or a
            number. A kept one counts as it is held, a ButterflyMoE layer packed.
        sparsity: Share of the submodules that can be replaced to replace by anything, instead of a
            budget.
        options: Which of `OPTIONS` may be chosen; `keep` always may.
        attention: Whether attention is ranked too.
        rank: Of the basis that feed-forward bypasses share. None: a quarter of the width.
        attention_rank: Of attention's. None: an eighth of the width.
        correction_rank: Of the corrections that `corrected` offers, one or several to choose from.
            None: that of the config, else a sixteenth of the width.
        include: Feed-forward blocks, see `swap_feed_forward`.
        exclude: Likewise.
        calibration: See `calibrated_swap`; always parallel over depth here.
        dry_run: Rank and choose, and leave the model as it is.
        **overrides: Fields of `ButterflyMoEConfig` that differ from `config`.

    Returns:
        The report; `report.swap` is what `restore` takes.

    Raises:
        ConfigError: Neither or both of budget and sparsity, or a value out of range.
        CalibrationError: The data does not fit the model, or the budget is too small.
        SwapError: There is no block.

    Source: SubFit-style (arXiv 2606.02559; its code and exact score are unpublished); score and
    knapsack ours.
    """
    config = ButterflyMoEConfig.from_dict(
        {**(config or ButterflyMoEConfig()).to_dict(), **overrides}
    )
    check_settings(config)
    limit = _check(budget, sparsity, options)
    settings = calibration or Calibration()
    with keep_rng():
        search = Search(model, config, settings, include, exclude, attention)
        search.watch(data, options, rank, attention_rank)
        search.warn_of_few()
        if {"butterfly", "corrected"} & set(options):
            ranks: tuple[int, ...] = ()
            if "corrected" in options:
                asked = correction_rank
                if asked is None:
                    asked = config.correction_rank or None
                ranks = correction_ranks(asked, search.widths())
            search.fit_layers(ranks)
        chosen = search.decide(limit, options)
        report = search.report(chosen, f"budget {budget}" if sparsity is None else
                               f"sparsity {sparsity:g}")  # fmt: skip
        if not dry_run:
            report.swap = put_in(search, chosen)
    return report


def put_in(search: Search, chosen: dict[str, str]) -> SwapReport:
    """Build what was chosen and put all of it in, or nothing."""
    entries: list[tuple[ReplacementPlan, Any]] = []
    report = SwapReport(skipped=search.skipped)
    report.calibration = search.calibration
    for s in search.submodules:
        name = chosen[s.path]
        if kind_of(name) in ("butterfly", "corrected"):
            c, layer = search.blocks[s.path], search.parked[s.path].unpark()
            assert c.placement is not None and isinstance(layer, ButterflyMoE)
            rank = rank_of(name)
            set_correction_(layer, search.corrections[s.path].leading(rank) if rank else None)
            config = dataclasses.replace(search.config, correction_rank=rank)
            row = describe_block(c, config, bias=True)
            fit = next(b for b in search.calibration.blocks if b.path == s.path)
            row.relative_error = (fit.by_rank[rank] if fit.by_rank else fit.error) ** 0.5
            report.blocks.append(row)
            entries.append((c.placement, layer))
        elif name != "keep":
            entries.append(_bypass(search, s, name))
    share_basis([layer for _, layer in entries if isinstance(layer, LinearBypass)])
    report.receipts = install(search.model, entries)
    report.placements = [plan_entry(layer) for layer, _ in report.receipts]
    return report


def _bypass(search: Search, s: Submodule, name: str) -> tuple[ReplacementPlan, LinearBypass]:
    """The module of a fitted bypass and its place."""
    fitted, module = search.linear[s.path][name], search.model.get_submodule(s.path)
    rank = 0 if fitted.left is None else fitted.left.shape[1]
    group = _GROUP if rank and search.rank and s.kind == "feed-forward" else None
    example = next(module.parameters())
    layer = LinearBypass(
        s.width, s.width, rank,
        outputs=search.streams[s.path].outputs, group=group, device=example.device,
    )  # fmt: skip
    with torch.no_grad():
        for own, value in ((layer.basis, fitted.right), (layer.weight, fitted.left)):
            if own is not None and value is not None:
                own.copy_(value)
        layer.bias.copy_(fitted.bias)
    layer.to(example.dtype)
    if s.kind == "attention":
        places = [p for p, m in search.model.named_modules(remove_duplicate=False) if m is module]
        last = [] if s.end is None else [s.end]
        finish_layer(layer, [module, *map(search.model.get_submodule, last)], 0.0)
        entry = replacement(
            s.path,
            aliases=[p for p in places if p != s.path],
            identities=last,
            attributes=_unfused(search.model, s.path),
        )
        entry["layer"] = {"family": "attention", "output_dropout": 0.0}
        return entry, layer
    c = search.blocks[s.path]
    assert c.placement is not None and c.block is not None
    finish_layer(layer, c.leaves, c.block.output_dropout)
    entry = copy.deepcopy(c.placement)
    entry["layer"] = {"family": c.family, "output_dropout": c.block.output_dropout}
    return entry, layer


def _unfused(model: nn.Module, path: str) -> dict[str, Scalar]:
    """What keeps a torch encoder around a place from reading weights past the module there."""
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts))]
    encoders = [p for p in around if isinstance(model.get_submodule(p), nn.TransformerEncoder)]
    return {f"{p}.use_nested_tensor": False for p in encoders}


def _check(budget: object, sparsity: object, options: Sequence[str]) -> int | float:
    strangers = [o for o in options if o not in OPTIONS]
    if strangers or not set(options) - {"keep"}:
        raise ConfigError(
            f"options name some of {OPTIONS}, not keep alone", got=list(options),
            fix="Use options=('keep', 'butterfly', 'bypass', 'remove').",
        )  # fmt: skip
    if (budget is None) == (sparsity is None):
        raise ConfigError(
            "a selection has a budget or a sparsity",
            got=f"budget={budget!r}, sparsity={sparsity!r}",
            fix="Write budget='40MB', or sparsity=0.25.",
        )
    if budget is not None:
        return parse_bytes(budget)  # type: ignore[arg-type]
    if not isinstance(sparsity, int | float) or not 0 < sparsity <= 1:
        raise ConfigError(
            "sparsity is a share of the submodules above 0, at most 1",
            got=f"sparsity={sparsity!r}", fix="Use sparsity=0.25.",
        )  # fmt: skip
    return float(sparsity)
