"""What the live charts share: when to draw, where, and that it costs next to nothing."""

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.viz.live import LiveOutput, Throttle, in_notebook
from lightning_bfmoe.viz.png import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT_SECONDS = 10.0  # between two lines of text, where there is no notebook


class LiveChart(pl.Callback):
    """A callback with one output that is drawn anew while a training runs.

    Subclasses have `figure` and `words`, and may override `collect`, which runs before a drawing.
    Drawn at the start, at the end or when the training breaks off, and between as often as the
    budget allows: after a drawing that took t seconds, at least t / budget seconds pass.

    Args:
        budget: Share of the time that drawing may take, in (0, 1].
        every_n_seconds: Seconds between two drawings, at least.
        name: Tells several callbacks apart, in checkpoints.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, budget: float, every_n_seconds: float, name: str | None) -> None:
        super().__init__()
        if not 0 < budget <= 1:
            raise ConfigError(
                "budget is a share of the time, in (0, 1]", got=budget, fix="Use 0.01 for 1 %."
            )
        if not every_n_seconds >= 0:
            raise ConfigError("every_n_seconds must be >= 0", got=every_n_seconds, fix="Use 2.0.")
        self.budget, self.every_n_seconds, self.name = budget, every_n_seconds, name
        self._output = LiveOutput()
        self._throttle = Throttle(budget, every_n_seconds)
        self._active = False

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    def figure(self) -> "Figure":
        """The chart as a matplotlib figure."""
        raise NotImplementedError

    def words(self, trainer: pl.Trainer) -> str:
        """The chart in one line of text."""
        raise NotImplementedError

    def collect(self, trainer: pl.Trainer) -> None:
        """Take in what is new, on rank zero, before a drawing."""

    def start(self, trainer: pl.Trainer) -> None:
        """Show the first chart; a subclass calls this in `on_train_start`."""
        self._active = trainer.is_global_zero and not trainer.barebones
        seconds = self.every_n_seconds if in_notebook() else _TEXT_SECONDS
        self._throttle = Throttle(self.budget, seconds)
        self._output = LiveOutput()
        if self._active and in_notebook():
            import matplotlib.figure  # noqa: F401  (its import is no part of a drawing's cost)

            self.draw(trainer)

    def draw_when_due(self, trainer: pl.Trainer) -> None:
        """Draw if the last time is long enough ago."""
        if self._active and self._throttle.is_due():
            self.draw(trainer)

    def draw(self, trainer: pl.Trainer) -> None:
        """Draw now."""
        began = time.monotonic()
        self.collect(trainer)
        self._output.show(lambda: png(self.figure()), self.words(trainer))
        self._throttle.spent(began)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        if self._active:
            self.draw(trainer)
        self._active = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins an output of its own."""
        return {**self.__dict__, "_output": LiveOutput(), "_active": False}
