"""`NotebookMonitor`: live charts of a training in one output, which stays in the notebook."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bfmoe.callbacks.live_chart import LiveChart
from lightning_bfmoe.callbacks.step_loss import step_loss
from lightning_bfmoe.viz.curves import Curves, curves_figure, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = ("*loss*", "*acc*", "*ppl*", "*perplexity*")
TRAIN_LOSS = "train_loss"
_SAME = {"loss", "train_loss", "train/loss", "training_loss"}
_FLUSH = 256  # losses that wait on their device before one copy brings them


class NotebookMonitor(LiveChart):
    """Draws loss and logged values while `fit` runs, into one PNG that is replaced.

    Lightning's progress bars are widgets, which leave nothing in a saved notebook; this leaves the
    last chart. The training loss is taken from `training_step` itself (on rank zero), so that a
    module which logs in validation only, or nothing at all, has a curve too. No logger is needed.
    Where there is no notebook it prints a line of text. Drawing takes at most `budget` of the time
    (see `LiveChart`); between drawings a step costs an addition on the device. Charts go on after a
    resume.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = NotebookMonitor()
        >>> trainer = Trainer(callbacks=[monitor], enable_progress_bar=False, logger=False)

    Args:
        metrics: Patterns (`fnmatch`) of logged values to draw beside the training loss; those that
            differ only by train, val or test share a panel. None: losses, accuracies, perplexities.
        budget: Share of the time that drawing may take, in (0, 1].
        every_n_seconds: Seconds between two drawings, at least.
        name: Tells several callbacks apart, in checkpoints.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | None = None,
        *,
        budget: float = 0.005,
        every_n_seconds: float = 2.0,
        name: str | None = None,
    ) -> None:
        super().__init__(budget, every_n_seconds, name)
        chosen = DEFAULT if metrics is None else metrics
        self.metrics = [chosen] if isinstance(chosen, str) else list(chosen)
        self.curves = Curves()
        self._restored = False
        self._clear()

    def _clear(self) -> None:
        self._sum: Tensor | float = 0.0  # of the batches of the step that runs
        self._batches = 0
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._step = 0
        self._seen: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clear()
        if not self._restored:
            self.curves = Curves()
        self._restored, self._step = False, trainer.global_step
        self.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._active:
            return
        loss = step_loss(trainer, pl_module, outputs)
        if loss is not None:
            self._sum, self._batches = self._sum + loss, self._batches + 1
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._batches and isinstance(self._sum, Tensor):
                self._steps.append(self._step)
                self._losses.append(self._sum / self._batches)
            self._sum, self._batches = 0.0, 0
            if len(self._losses) >= _FLUSH:
                self._flush()
            self.draw_when_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and not trainer.sanity_checking:
            self.collect(trainer)
            self.draw_when_due(trainer)

    def collect(self, trainer: pl.Trainer) -> None:
        """Bring the waiting losses from their device, and what was logged."""
        self._flush()
        if not trainer.interrupted:  # asking for logged values can wait for ranks that are gone
            self._take_logged(trainer)

    def _flush(self) -> None:
        if self._losses:
            values = torch.stack(self._losses).tolist()  # the one copy from the device
            for step, value in zip(self._steps, values, strict=True):
                self.curves.add(TRAIN_LOSS, step, value)
            self._steps, self._losses = [], []

    def _take_logged(self, trainer: pl.Trainer) -> None:
        """Take logged values that are new: an old one stays in Lightning's table as it is."""
        has_loss = bool(self._losses) or TRAIN_LOSS in self.curves.names
        for key, value in trainer.callback_metrics.items():
            base = key.removesuffix("_step").removesuffix("_epoch")
            if has_loss and base in _SAME:
                continue
            if not any(fnmatchcase(key, p) for p in self.metrics):
                continue
            if self._seen.get(key) is not value:
                self._seen[key] = value
                self.curves.add(key, self._step, float(value))

    def words(self, trainer: pl.Trainer) -> str:
        """The newest values."""
        return in_words(self.curves, self._step)

    def figure(self) -> "Figure":
        """Loss and logged values over the optimizer steps."""
        return curves_figure(self.curves)

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {"curves": self.curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = Curves()
        self.curves.load_state_dict(state_dict["curves"])
        self._restored = True
