"""The course of one selection: watch all submodules, fit each option, choose, put in."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate import Calibration, calibrate_layers
from lightning_bfmoe.calibrate.attention import CACHED, find_attention, keeps_cache
from lightning_bfmoe.calibrate.batches import Batches
from lightning_bfmoe.calibrate.bypass import (
    Bypass,
    Statistics,
    canonical_bound,
    fit_bypass,
    fit_on_basis,
    linear_error,
    shared_basis,
)
from lightning_bfmoe.calibrate.knapsack import Option, choose
from lightning_bfmoe.calibrate.park import Parked
from lightning_bfmoe.calibrate.progress import Progress
from lightning_bfmoe.calibrate.selection import Ranked, SelectionReport, kind_of
from lightning_bfmoe.calibrate.streams import Stream, Submodule, watch_streams
from lightning_bfmoe.calibrated import Course, Layer
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import CalibrationError, ConfigError
from lightning_bfmoe.layers import ButterflyMoE, LowRankCorrection
from lightning_bfmoe.layers.correction import set_correction_
from lightning_bfmoe.swap.build import block_bytes
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.find import find_feed_forward
from lightning_bfmoe.swap.report import skipped_rows
from lightning_bfmoe.swap.select import Patterns, select_candidates
from lightning_bfmoe.swap.swap import describe_block

ROUTED = "its experts have a router of their own; swap_feed_forward takes them"
OPTIONS = ("keep", "butterfly", "corrected", "bypass", "remove")


class Search:
    """What was seen, what was fitted, what was chosen and what is put in."""

    def __init__(
        self,
        model: nn.Module,
        config: ButterflyMoEConfig,
        settings: Calibration,
        include: Patterns,
        exclude: Patterns,
        attention: bool,
    ) -> None:
        config = dataclasses.replace(config, correction_rank=0)
        self.model, self.config, self.settings = model, config, settings
        found = find_feed_forward(model)
        chosen = select_candidates(model, found, include, exclude)
        self.skipped = skipped_rows(c for c in found if not any(c is taken for taken in chosen))
        self.blocks: dict[str, Candidate] = {c.path: c for c in chosen}
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        self.submodules = [
            Submodule(c.path, "feed-forward", c.block.d_model, c.block,
                      refused=ROUTED if c.experts else "")
            for c in chosen if c.block is not None
        ]  # fmt: skip
        if attention:
            self.submodules += find_attention(model, self._width)
        self.submodules.sort(key=lambda s: order[s.path])
        self.streams: dict[str, Stream] = {}
        self.statistics: dict[str, Statistics] = {}
        self.measures: dict[str, tuple[float, float]] = {}
        self.rank = 0  # of the basis that feed-forward bypasses share
        self.linear: dict[str, dict[str, Bypass]] = {s.path: {} for s in self.submodules}
        self.basis: Tensor | None = None
        self.parked: dict[str, Parked] = {}
        self.tokens: dict[str, int] = {}
        self.ranks: tuple[int, ...] = ()  # of the corrections that are offered
        self.corrections: dict[str, LowRankCorrection] = {}
        self.eps: dict[str, dict[str, float]] = {}
        self.calibration: Any = None

    def _width(self, path: str) -> int | None:
        """The residual width at an attention submodule: that of a block in the same layer."""
        parts = path.split(".")
        for n in range(len(parts) - 1, -1, -1):
            prefix = ".".join(parts[:n])
            inside = [c for p, c in self.blocks.items() if not prefix or p.startswith(prefix + ".")]
            if inside and inside[0].block is not None:
                return inside[0].block.d_model
        return None

    def watch(
        self,
        data: Iterable[Any],
        options: Sequence[str] = OPTIONS,
        rank: int | None = None,
        attention_rank: int | None = None,
    ) -> None:
        """Criteria, a sample and linear fits of all submodules, in groups that fit into memory."""
        widths = {s.width for s in self.submodules if s.kind == "feed-forward"}
        if "bypass" in options and len(widths) == 1:
            self.rank = _rank("rank", rank, widths.pop(), 4)
        settings = self.settings
        self.batches = Batches(data, max_batches=settings.max_batches, held_out=settings.held_out)
        room, groups = settings.budget(self.model), [[]]  # type: ignore[var-annotated]
        for s in self.submodules:
            cost = 8 * (2 * s.width + 1) ** 2
            if groups[-1] and cost * (len(groups[-1]) + 1) > room:
                groups.append([])
            groups[-1].append(s)
        passes = len(groups) * len(self.batches)
        with Progress(settings.progress, passes, len(self.submodules)) as progress:
            for group in groups:
                seen = watch_streams(
                    self.model, group, self.batches, forward_fn=settings.forward_fn,
                    mask_fn=settings.mask_fn, on_batch=progress.batch,
                )  # fmt: skip
                for s in group:
                    self.streams[s.path] = stream = seen.pop(s.path)
                    if not stream.refused:
                        self.digest(s, stream, options, attention_rank)
                    progress.block()
        attention = [s.path for s in self.submodules if s.kind == "attention"]
        cached = [p for p in attention if keeps_cache(self.model.get_submodule(p))][:1]
        for path in cached:
            self.streams[path].refused = self.streams[path].refused or CACHED
        open_ = [s for s in self.submodules if not self.streams[s.path].refused]
        blocks = [s.path for s in open_ if s.kind == "feed-forward"]
        if self.rank and blocks:
            self.share(blocks)
        for s in open_:
            fits = self.linear[s.path].items()
            eps = {name: self.streams[s.path].eps(fit) for name, fit in fits}
            self.eps[s.path] = {"keep": 0.0, **eps}

    def digest(
        self, s: Submodule, stream: Stream, options: Sequence[str], attention_rank: int | None
    ) -> None:
        """Make of a submodule's moments what is needed, and let them go."""
        statistics = stream.moments.statistics()
        self.tokens[s.path] = stream.moments.count
        del stream.moments
        self.measures[s.path] = linear_error(statistics), canonical_bound(statistics)
        own = self.linear[s.path]
        if "bypass" in options and (s.kind == "attention" or not self.rank):
            own["bypass"] = fit_bypass(
                statistics, _rank("attention_rank", attention_rank, s.width, 8)
            )
        if "remove" in options:
            own["remove"] = fit_bypass(statistics, 0)
        if s.kind == "feed-forward" and self.rank:  # a basis is fitted to several of these
            self.statistics[s.path] = statistics._replace(c_yy=statistics.c_yy[:0])

    def share(self, paths: list[str]) -> None:
        """Fit the shared basis to these feed-forward submodules, and their maps on it."""
        self.basis = shared_basis([self.statistics[p] for p in paths], self.rank)
        for p in paths:
            self.linear[p]["bypass"] = fit_on_basis(self.statistics[p], self.basis)

    def warn_of_few(self) -> None:
        """Say which fitted maps saw fewer tokens than their moments have rows."""
        few = [s for s in self.submodules if 0 < self.tokens.get(s.path, s.width + 1) <= s.width]
        if few and any(s.path in self.linear and "bypass" in self.linear[s.path] for s in few):
            s = few[0]
            warnings.warn(
                f"the bypass of {s.path!r} was fitted to {self.tokens[s.path]} tokens, so the "
                f"moments of its input have a lower rank than its width; a ridge fills the rest. "
                f"Give at least {s.width + 1} tokens, better {8 * s.width}, with more batches.",
                stacklevel=3,
            )

    def widths(self) -> set[int]:
        """The smaller width of each feed-forward block, input or output."""
        blocks = [c.block for c in self.blocks.values() if c.block is not None and not c.experts]
        return {min(b.d_model, b.d_out) for b in blocks}

    def fit_layers(self, ranks: Sequence[int] = ()) -> None:
        """Calibrate a layer for every feed-forward block, and take its error.

        Args:
            ranks: Of corrections to offer; the largest is fitted, its leading parts are the others.
        """
        self.ranks = tuple(ranks)
        config = dataclasses.replace(self.config, correction_rank=max(ranks, default=0))
        course = Course(self.model, False, config, {})

        def done(c: Candidate, layer: Layer) -> None:
            assert isinstance(layer, ButterflyMoE)
            stream, eps, whole = self.streams[c.path], self.eps[c.path], layer.correction
            layer.eval()
            with torch.no_grad():
                for rank in self.ranks if whole is not None else ():
                    assert whole is not None
                    eps[f"butterfly+{rank}"] = stream.eps(
                        set_correction_(layer, whole.leading(rank))
                    )
                eps["butterfly"] = stream.eps(set_correction_(layer, None))
            if whole is not None:
                self.corrections[c.path] = whole
            self.parked[c.path] = Parked(layer)

        open_ = [c for p, c in self.blocks.items() if not self.streams[p].refused]
        jobs = [course.job(c, done) for c in open_]
        if jobs:
            parallel = dataclasses.replace(self.settings, sequential=False)
            self.calibration = calibrate_layers(self.model, jobs, self.batches.data, parallel)

    def sizes(self, s: Submodule) -> dict[str, int]:
        """Bytes by option; the shared basis is counted apart."""
        if s.kind == "feed-forward":
            found = {"keep": block_bytes(self.blocks[s.path])[1]}
            for rank in (0, *self.ranks):
                config = dataclasses.replace(self.config, correction_rank=rank)
                row = describe_block(self.blocks[s.path], config, bias=True)
                found[f"butterfly+{rank}" if rank else "butterfly"] = row.packed_bytes
        else:
            modules = [self.model.get_submodule(p) for p in (s.path, s.end) if p is not None]
            weights = {id(p): p for m in modules for p in m.parameters()}.values()
            found = {"keep": sum(p.numel() * p.element_size() for p in weights)}
        each = self._element(s)
        for name, b in self.linear[s.path].items():
            parts = [b.bias, b.left, b.right if s.kind == "attention" or not self.rank else None]
            found[name] = each * sum(t.numel() for t in parts if t is not None)
        return found

    def _element(self, s: Submodule) -> int:
        module = self.model.get_submodule(s.path)
        return next((p.element_size() for p in module.parameters()), 4)

    def decide(self, limit: int | float, options: Sequence[str]) -> dict[str, str]:
        """The best option of each submodule, with and without feed-forward bypasses."""
        shared = 0
        if self.basis is not None:
            shared = 4 * self.basis.numel()
        trials = [(True, shared)] + ([(False, 0)] if shared else [])
        best: tuple[float, dict[str, str]] | None = None
        problem: CalibrationError | None = None
        for bypassed, fixed in trials:
            groups, names = [], []
            for s in self.submodules:
                offered = self.offered(s, bypassed, options)
                names.append([o.name for o in offered])
                if isinstance(limit, float):  # a count: each one that is kept takes 1
                    offered = [o._replace(size=int(o.name == "keep")) for o in offered]
                groups.append(offered)
            if isinstance(limit, float):
                free = sum(not self.streams[s.path].refused for s in self.submodules)
                room = len(groups) - math.ceil(limit * free)
            else:
                room = limit - fixed
            try:
                picks = choose(groups, room)
            except CalibrationError as error:
                problem = error  # in the end that of the smaller choice
                continue
            cost = sum(group[i].cost for group, i in zip(groups, picks, strict=True))
            if best is None or cost < best[0]:
                chosen = [n[i] for n, i in zip(names, picks, strict=True)]
                paths = [s.path for s in self.submodules]
                best = cost, dict(zip(paths, chosen, strict=True))
        if best is None:
            assert problem is not None
            raise problem
        return best[1]

    def offered(self, s: Submodule, bypassed: bool, options: Sequence[str]) -> list[Option]:
        """What a submodule may get; `keep` always."""
        sizes, eps = self.sizes(s), self.eps.get(s.path, {"keep": 0.0})
        if not bypassed and s.kind == "feed-forward" and self.rank:
            eps = {n: e for n, e in eps.items() if n != "bypass"}
        allowed = [n for n in eps if n == "keep" or {n, kind_of(n)} & set(options)]
        allowed.sort(key=lambda n: OPTIONS.index(kind_of(n)))
        return [Option(name, sizes[name], eps[name]) for name in allowed]

    def report(self, chosen: dict[str, str], limit: str) -> SelectionReport:
        """The table; with the basis of the bypasses that were really chosen."""
        taken = [s.path for s in self.submodules
                 if s.kind == "feed-forward" and chosen[s.path] == "bypass"]  # fmt: skip
        shared = bool(taken) and self.rank > 0
        if shared:
            self.share(taken)
            for p in taken:
                self.eps[p]["bypass"] = self.streams[p].eps(self.linear[p]["bypass"])
        report = SelectionReport(limit=limit, shared_rank=self.rank if shared else 0)
        report.skipped = self.skipped
        report.shared_bytes = 4 * self.basis.numel() if shared and self.basis is not None else 0
        for s in self.submodules:
            stream, sizes = self.streams[s.path], self.sizes(s)
            row = Ranked(s.path, s.kind, chosen[s.path], sizes["keep"], sizes[chosen[s.path]])
            row.eps = dict(self.eps.get(s.path, {}))
            row.sizes = {n: v for n, v in sizes.items() if n in row.eps}
            row.note = stream.refused or ("added to its own input" if stream.post_norm else "")
            if s.path in self.measures:
                row.one_minus_cosine, row.norm_ratio = stream.one_minus_cosine, stream.norm_ratio
                row.linear_error, row.canonical_bound = self.measures[s.path]
            report.submodules.append(row)
        return report


def correction_ranks(value: int | Sequence[int] | None, widths: set[int]) -> tuple[int, ...]:
    """Ranks of corrections as asked for; a sixteenth of the smallest width when None."""
    if not widths:
        return ()
    several = value if isinstance(value, Sequence) else [value]
    found = {_rank("correction_rank", each, min(widths), 16) for each in several}
    return tuple(sorted(found))


def _rank(name: str, value: int | None, width: int, share: int) -> int:
    value = max(1, width // share) if value is None else value
    if not isinstance(value, int) or not 1 <= value <= width:
        raise ConfigError(
            f"{name} lies in 1 to the width {width}", got=f"{name}={value!r}", fix="Use None."
        )
    return value
