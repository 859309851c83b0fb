"""The course of a calibration: which moments are collected in which pass, and fitted after it."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate.batches import Batches
from lightning_bfmoe.calibrate.correction import fit_correction_
from lightning_bfmoe.calibrate.feed_forward import (
    BlockFit,
    Dense,
    degraded_hidden,
    fit_inputs_,
    fit_output_,
)
from lightning_bfmoe.calibrate.heap import return_free_memory
from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.calibrate.observe import Watcher, observe
from lightning_bfmoe.calibrate.progress import Progress
from lightning_bfmoe.calibrate.report import CalibrationReport
from lightning_bfmoe.calibrate.router import router_weight
from lightning_bfmoe.calibrate.settings import Calibration
from lightning_bfmoe.errors import CalibrationError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE

Layer = ButterflyMoE | ButterflyExperts
_SAMPLE = 2048  # tokens that routers are clustered on


@dataclass
class Job:
    """One block to calibrate.

    Args:
        path: Of the module in the model that the new layer will replace; its input is watched.
        dense: The block.
        build: Makes the new layer, on the block's device.
        cost: Bytes of its moments, see `settings.moment_bytes`.
        done: Takes the finished layer; in a sequential run it puts it into the model.
    """

    path: str
    dense: Dense
    build: Callable[[], Layer]
    cost: int
    done: Callable[[Layer], Any]


class _Work:
    """A job while its moments are held."""

    def __init__(self, job: Job, settings: Calibration) -> None:
        self.job, self.settings = job, settings
        self.layer: Layer | None = None  # built when its turn comes
        self.device = job.dense.up.device
        self.report = BlockFit(job.path)
        self.sample: list[Tensor] = []
        self.hidden: Callable[[Tensor], Tensor] | None = None
        self.pair = self._moments(job.dense.up.shape[1], 0)

    def _moments(self, d: int, d_target: int) -> tuple[Moments, Moments]:
        kinds = (torch.float64, torch.float32)  # the fit, the judge
        fit, held = (
            Moments(d, d_target, name=self.job.path, dtype=kind, device=self.device)
            for kind in kinds
        )
        return fit, held

    @property
    def corrected(self) -> bool:
        """Whether inputs are seen beside the hidden units, for a correction."""
        return isinstance(self.layer, ButterflyMoE) and self.layer.correction is not None

    def watch_input(self, rows: Tensor, held: bool) -> None:
        self.pair[held].update(rows)
        room = _SAMPLE - sum(map(len, self.sample))
        if self.settings.router == "clusters" and not held and room > 0:
            self.sample.append(rows[:: max(1, len(rows) // 128)][:room].float())

    def watch_hidden(self, rows: Tensor, held: bool) -> None:
        assert self.hidden is not None
        for part in rows.split(2048):
            wanted = self.job.dense.function(part)  # under the model's own autocast, if any
            with torch.autocast(part.device.type, enabled=False):
                seen = self.hidden(part)
                if self.corrected:
                    seen = torch.cat([seen, part.to(seen.dtype)], dim=1)
                self.pair[held].update(seen, wanted)

    def fit_inputs(self) -> None:
        fit, held = self.pair
        self.report.tokens, self.report.held_tokens = fit.count, held.count
        if min(fit.count, held.count) < 2:
            raise CalibrationError(
                "a block is calibrated on at least two tokens, and judged on two others",
                got=f"{fit.count} and {held.count} at {self.job.path!r}",
                fix="Give more batches.",
            )
        layer = self.layer = self.job.build()
        self.report.choices = fit_inputs_(layer, self.job.dense, fit, held, self.settings.recipe)
        if self.sample and isinstance(layer, ButterflyMoE):
            router = layer.router
            router.weight.data.copy_(
                router_weight(torch.cat(self.sample), router.num_experts, seed=0)
            )
        self.sample = []
        self.hidden = degraded_hidden(layer)
        units, d = self.job.dense.up.shape
        beside = d if self.corrected else 0
        self.pair = self._moments(units + beside, self.job.dense.down.shape[0])

    def fit_output(self) -> BlockFit:
        fit, held = self.pair
        assert self.layer is not None
        choice, ridge = fit_output_(self.layer, self.job.dense, fit, held, self.settings.recipe)
        self.report.choices["down"], self.report.ridge = choice, ridge
        self.report.error = choice.error
        self.report.dead_units = fit.head(len(self.job.dense.up)).dead()
        if isinstance(self.layer, ButterflyMoE) and self.layer.correction is not None:
            self.report.by_rank = fit_correction_(self.layer, fit, held)
            self.report.error = self.report.by_rank[-1]
        self.job.done(self.layer)
        return self.report


def calibrate_layers(
    model: nn.Module, jobs: list[Job], data: Iterable[Any], settings: Calibration
) -> CalibrationReport:
    """Fits new layers to a model's blocks; the model itself is only run.

    Moments of a block's inputs give up and gate; with those, moments of its hidden units give down.
    Blocks are taken in groups whose moments fit into memory. While the hidden units of one group
    are watched, so are the inputs of the next, unless that one shall see what this one becomes.

    Args:
        model: Runs on the batches.
        jobs: Blocks.
        data: Dataloader or iterable of batches.
        settings: Of the calibration.

    Returns:
        The report.

    Raises:
        CalibrationError: The data does not fit the model, or holds too little.
    """
    started = time.perf_counter()
    batches = Batches(data, max_batches=settings.max_batches, held_out=settings.held_out)
    report = CalibrationReport(sequential=settings.sequential)
    feed: dict[str, Any] = {"forward_fn": settings.forward_fn, "mask_fn": settings.mask_fn}
    if settings.sequential:
        first = [next(iter(batches))]
        order = observe(model, first, {job.path: lambda *_: None for job in jobs}, **feed)
        jobs = sorted(jobs, key=lambda job: order.index(job.path))
    groups = group_jobs(jobs, settings.budget(model), settings.group)
    passes = (2 * len(groups)) if settings.sequential else len(groups) + 1
    with Progress(settings.progress, passes * len(batches), len(jobs)) as progress:

        def run(watchers: dict[str, Watcher]) -> None:
            observe(model, batches, watchers, on_batch=progress.batch, **feed)
            report.passes += 1
            return_free_memory()

        upcoming: list[_Work] = []
        for index, group in enumerate(groups):
            works = upcoming or [_Work(job, settings) for job in group]
            if not upcoming:
                run({work.job.path: work.watch_input for work in works})
            for at in range(len(works)):  # no name may outlive the loop and hold its moments
                works[at].fit_inputs()
                return_free_memory()
            upcoming = []
            if not settings.sequential and index + 1 < len(groups):
                upcoming = [_Work(job, settings) for job in groups[index + 1]]
            watchers: dict[str, Watcher] = {w.job.path: w.watch_hidden for w in works}
            watchers.update({w.job.path: w.watch_input for w in upcoming})
            run(watchers)
            watchers.clear()
            fitted = []
            while works:  # each one's moments go before the next one is fitted
                fitted.append(works.pop(0).fit_output())
                return_free_memory()
                progress.block()
            report.blocks += fitted
            _warn_of_few(fitted, group)
    report.seconds = time.perf_counter() - started
    return report


def group_jobs(jobs: list[Job], budget: int, most: int | None) -> list[list[Job]]:
    """Jobs in order, in groups of at most `most` that cost at most `budget` bytes; never empty.

    Example:
        >>> make = lambda cost: Job("", None, None, cost, None)
        >>> [len(group) for group in group_jobs([make(2), make(2), make(9), make(1)], 4, None)]
        [2, 1, 1]
    """
    groups: list[list[Job]] = []
    room = 0
    for job in jobs:
        if not groups or job.cost > room or (most is not None and len(groups[-1]) >= most):
            groups.append([])
            room = budget
        groups[-1].append(job)
        room -= job.cost
    return groups


def _warn_of_few(blocks: list[BlockFit], jobs: list[Job]) -> None:
    few = [
        (block, len(job.dense.up))
        for block, job in zip(blocks, jobs, strict=True)
        if block.tokens <= len(job.dense.up)
    ]
    if few:
        block, units = few[0]
        warnings.warn(
            f"{block.path!r} was calibrated on {block.tokens} tokens, so the moments of its "
            f"{units} hidden units have a lower rank than {units}; a ridge fills the rest. Give at "
            f"least {units + 1} tokens, better {8 * units} (8 per hidden unit), with more batches.",
            stacklevel=4,
        )
    dead = [block for block in blocks if block.dead_units]
    if dead:
        warnings.warn(
            f"{dead[0].dead_units} hidden units of {dead[0].path!r} gave the same value for all "
            "calibration tokens; their columns of the output matrix are kept as they were.",
            stacklevel=4,
        )
