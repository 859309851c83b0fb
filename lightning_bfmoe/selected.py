"""`selected_swap`: of all submodules, which are replaced, and by what, under one budget."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.calibrate.feed_forward import check_settings
from lightning_bfmoe.calibrate.knapsack import parse_bytes
from lightning_bfmoe.calibrate.selection import SelectionReport
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.selecting import OPTIONS, Search
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.select import Patterns


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
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> SelectionReport:
    r"""Ranks all feed-forward and attention submodules and replaces those that matter least.

    Each submodule F is judged by the residual-stream error that a replacement G would make on
    held-out tokens (`calibrate.streams`), one at a time, and gets one option: `keep`; `butterfly`,
    a calibrated ButterflyMoE layer (feed-forward only); `bypass`, a fitted low-rank linear map,
    with one basis for all feed-forward ones and an own one for attention; or `remove`, its mean
    output as a constant. The sum of the errors is minimised exactly under the budget
    (`calibrate.knapsack`). Errors are taken as if they added up, which they nearly do where they
    are small; look at the loss as well.

    The first attention submodule is kept: a generation cache counts its length by it. Attention of
    `nn.MultiheadAttention` or that adds the residual itself (BERT) is not seen.

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
        [('1.0', 'bypass')]

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
        search.watch(data)
        search.fit_linear(options, rank, attention_rank)
        if "butterfly" in options:
            search.fit_layers(data)
        chosen = search.decide(limit, options)
        report = search.report(chosen, f"budget {budget}" if sparsity is None else
                               f"sparsity {sparsity:g}")  # fmt: skip
        if not dry_run:
            report.swap = search.install(chosen)
    return report


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
