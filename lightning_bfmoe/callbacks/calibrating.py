"""The calibration inside `fit`: once, on the first process, before the optimizers are built.

Lightning moves the module to its device and wraps it for DDP before it asks for optimizers. So the
layers are put in early, as by any swap, and filled here in place: their parameters stay the objects
that the wrapper knows.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from lightning_bfmoe.calibrate import Calibration
from lightning_bfmoe.calibrate.batches import call_model
from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.callbacks.swapping import Swapper, plain_dtype
from lightning_bfmoe.callbacks.training_data import from_here, train_data
from lightning_bfmoe.errors import CalibrationError, SwapError
from lightning_bfmoe.prepared import fill_swapped
from lightning_bfmoe.swap import SwapReport, restore

_HOOK = "configure_optimizers"
_ROUND = itertools.count()  # all processes calibrate equally often, so they count alike
_PATIENCE = 24 * 3600  # seconds that other processes wait for the first
_GOODBYE = 10  # seconds that a failed first one waits until all have heard of it
_FEED = (
    "Tell how one batch is fed: ButterflyMoECallback(init='calibrated', calibration="
    "Calibration(forward_fn=lambda module, batch: module.net(batch[0]))); in a YAML file the path "
    "of a function, calibration: {forward_fn: my_package.feed}."
)


class Calibrator:
    """Fills the layers that a `Swapper` has put in, before a fit builds its optimizers.

    Args:
        settings: Of the calibration.
        swapper: Holds the layers' originals until then.
    """

    def __init__(self, settings: Calibration, swapper: Swapper) -> None:
        self.settings, self.swapper = settings, swapper

    def watch(self, trainer: pl.Trainer, module: pl.LightningModule, owner: Any) -> None:
        """Have `run` called when the module is asked for its optimizers; `owner` gets the report.

        Raises:
            SwapError: The strategy shards parameters.
        """
        if "ModelParallelStrategy" in {cls.__name__ for cls in type(trainer.strategy).__mro__}:
            raise SwapError(
                "a calibration inside fit runs the whole model on the first process",
                got=f"strategy {type(trainer.strategy).__name__}, which shards it",
                fix="Call calibrated_swap(module, data, ...) before fully_shard in "
                "configure_model, and use the callback without init='calibrated'.",
            )
        self.unwatch(module)
        original, patched = getattr(module, _HOOK), _HOOK in module.__dict__

        @functools.wraps(original)
        def once(*args: Any, **kwargs: Any) -> Any:
            self.unwatch(module)
            if (report := self.run(trainer, module)) is not None:
                owner.report = report
                if owner.verbose:
                    show_calibration(report)
            return original(*args, **kwargs)

        once._bfmoe_was_in_dict = patched  # type: ignore[attr-defined]
        module.__dict__[_HOOK] = once

    @staticmethod
    def unwatch(module: nn.Module) -> None:
        """Take the wrapper off a module, or off its copy."""
        wrapper = module.__dict__.get(_HOOK)
        if wrapper is not None and hasattr(wrapper, "_bfmoe_was_in_dict"):
            del module.__dict__[_HOOK]
            if wrapper._bfmoe_was_in_dict:
                module.__dict__[_HOOK] = wrapper.__wrapped__

    def drop(self) -> None:
        """Let go of the originals: the layers have come from a checkpoint."""
        self.swapper.held = None

    def run(self, trainer: pl.Trainer, module: pl.LightningModule) -> SwapReport | None:
        """Calibrate on the first process, and give all others what it found.

        Returns:
            The report on the first process; None on others and where there is nothing to do.

        Raises:
            CalibrationError: It failed, here or on the first process; the module is dense again.
        """
        held, self.swapper.held = self.swapper.held, None
        if held is None or not held.receipts or trainer.ckpt_path is not None:
            return None
        layers = [layer for layer, _ in held.receipts]
        report: SwapReport | None = None
        news = _News()
        try:
            data = train_data(trainer)  # on every process: a user's method may synchronise
            if trainer.is_global_zero:
                report = self._fill(trainer, module, held, data)
                report.release()
            else:
                news.wait()
        except BaseException as error:
            if held.receipts:
                restore(module, held)
            if trainer.is_global_zero:
                news.tell(f"{type(error).__name__}: {error}")
            raise
        held.release()
        if trainer.is_global_zero:
            news.tell()
        for layer in layers:
            for tensor in (*layer.parameters(), *layer.buffers()):
                if news.others:
                    dist.broadcast(tensor.detach(), src=0)
        _refresh_copies(trainer, module, layers)
        return report

    def _fill(
        self, trainer: pl.Trainer, module: pl.LightningModule, held: SwapReport, data: Iterable[Any]
    ) -> SwapReport:
        precision = trainer.precision_plugin
        own = self.settings.forward_fn or call_model

        def feed(model: nn.Module, batch: Any) -> None:
            batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
            with precision.forward_context():
                own(model, batch)

        settings = dataclasses.replace(
            self.settings,
            forward_fn=feed,
            progress=self.settings.progress and trainer.progress_bar_callback is not None,
        )
        rank_zero_info(f"Calibrating {len(held.receipts)} layers on batches of the training data.")
        swapper = self.swapper
        try:
            with plain_dtype(), from_here(data) as batches:
                return fill_swapped(
                    module, held, batches, swapper.config, include=swapper.include,
                    exclude=swapper.exclude, calibration=settings,
                    on_restored=lambda: precision.convert_module(module),
                )  # fmt: skip
        except CalibrationError as error:
            if "forward_fn" not in error.fix:
                raise
            raise CalibrationError(error.rule, got=error.got, fix=_FEED) from error


class _News:
    """What the first process tells the others, through the process group's key-value store.

    Not by a collective: those give up after minutes, and a calibration may take longer.
    """

    def __init__(self) -> None:
        self.key = f"bfmoe/calibration/{next(_ROUND)}"
        self.others = _distributed_is_initialized() and dist.get_world_size() > 1

    def tell(self, problem: str = "") -> None:
        if not self.others:
            return
        store, end = _get_default_store(), time.monotonic() + _GOODBYE
        store.set(self.key, problem or "done")
        while problem and time.monotonic() < end:  # the store ends with this process
            if store.add(f"{self.key}/heard", 0) >= dist.get_world_size() - 1:
                return
            time.sleep(0.05)

    def wait(self) -> None:
        store, end = _get_default_store(), time.monotonic() + _PATIENCE
        problem = f"nothing from it for {_PATIENCE / 3600:g} h"
        try:
            while time.monotonic() < end:
                if store.check([self.key]):
                    problem = store.get(self.key).decode()
                    store.add(f"{self.key}/heard", 1)
                    break
                time.sleep(0.1)
        except RuntimeError as error:
            problem = f"its end ({type(error).__name__})"
        if problem != "done":
            raise CalibrationError("the first process calibrates for all", got=problem)


@rank_zero_only
def show_calibration(report: SwapReport) -> None:
    """One line on what a calibration reached; `callback.report.calibration` has the table."""
    if report.calibration is None:
        return
    errors = sorted(block.error for block in report.calibration.blocks)
    tokens = min(block.tokens for block in report.calibration.blocks)
    middle = errors[len(errors) // 2]
    rank_zero_info(
        f"Calibrated on {tokens} tokens: squared relative error of the blocks' outputs on held-out "
        f"tokens {middle:.3g} in the middle, {errors[0]:.3g} to {errors[-1]:.3g}."
    )


def _refresh_copies(trainer: pl.Trainer, module: nn.Module, layers: list[Any]) -> None:
    """Averages that began as copies of the module begin at the calibrated layers too."""
    names = {id(m): name for name, m in module.named_modules()}
    for average in guards.averaged_copies(trainer):
        inner = getattr(average, "module", average)
        Calibrator.unwatch(inner)
        for layer in layers:
            twin = inner.get_submodule(names[id(layer)])
            pairs = [*zip(twin.parameters(), layer.parameters(), strict=True)]
            pairs += zip(twin.buffers(), layer.buffers(), strict=True)
            for theirs, ours in pairs:
                _copy(theirs, ours)


def _copy(to: Tensor, source: Tensor) -> None:
    to.data.copy_(source.detach())
