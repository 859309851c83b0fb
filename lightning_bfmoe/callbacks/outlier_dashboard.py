"""`OutlierDashboard`: before and after each rotation, live, from what `ActivationOutliers` logs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_bfmoe.callbacks.live_chart import LiveChart
from lightning_bfmoe.callbacks.outliers import ActivationOutliers
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.outliers import MEASURES
from lightning_bfmoe.viz.outlier_picture import OutlierHistory, outlier_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OutlierDashboard(LiveChart):
    """Draws what the rotations do to the outliers, while `fit` runs, into one PNG.

    For each measure: its mean over all matrices before and after the rotations over the steps, and
    beneath it the newest values of every matrix. It takes the records of the `ActivationOutliers`
    that stands in the same Trainer, of which it is a picture: it measures nothing itself. Where
    there is no notebook it prints a line of text.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callbacks = [ActivationOutliers(every_n_steps=50, hadamard=True), OutlierDashboard()]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)

    Args:
        measures: Names in `functional.outliers.MEASURES` that are drawn.
        source: `name` of the `ActivationOutliers` to draw, where there are several.
        budget: Share of the time that drawing may take, in (0, 1].
        every_n_seconds: Seconds between two drawings, at least.
        name: Tells several dashboards apart, in checkpoints.

    Raises:
        ConfigError: A setting is unknown; on fit, when no `ActivationOutliers` measures these.

    Source: measures `functional.outliers`.
    """

    def __init__(
        self,
        measures: str | Sequence[str] = ("kurtosis", "incoherence"),
        *,
        source: str | None = None,
        budget: float = 0.005,
        every_n_seconds: float = 2.0,
        name: str | None = None,
    ) -> None:
        super().__init__(budget, every_n_seconds, name)
        self.measures = [measures] if isinstance(measures, str) else list(measures)
        if not self.measures or not set(self.measures) <= set(MEASURES):
            raise ConfigError(f"measures are some of {list(MEASURES)}", got=self.measures)
        self.source = source
        self.history = OutlierHistory()
        self._restored = False
        self._outliers: ActivationOutliers | None = None
        self._taken: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        everything: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in everything if isinstance(c, ActivationOutliers)]
        fitting = [c for c in found if self.source is None or c.name == self.source]
        if len(fitting) != 1 or not set(self.measures) <= set(fitting[0].measures):
            names = [f"ActivationOutliers(name={c.name!r}, measures={c.measures})" for c in found]
            raise ConfigError(
                f"OutlierDashboard draws one ActivationOutliers that measures {self.measures}",
                got=", ".join(names) or "none among the Trainer's callbacks",
                fix="Write callbacks=[ActivationOutliers(...), OutlierDashboard()]; where there "
                "are several, give one a name and the dashboard source=.",
            )
        self._outliers = fitting[0]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._restored:
            self.history = OutlierHistory()
        self._restored = False
        self._taken = self._outliers.latest if self._outliers is not None else {}
        self.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._take(trainer):
            self.draw_when_due(trainer)

    def collect(self, trainer: pl.Trainer) -> None:
        """Take the newest record."""
        self._take(trainer)

    def _take(self, trainer: pl.Trainer) -> bool:
        """Whether there was a new record; each is a new dict."""
        if not self._active or self._outliers is None:
            return False
        latest = self._outliers.latest
        if latest is self._taken or not latest:
            return False
        self._taken = latest
        prefix = "outliers/" if self._outliers.name is None else f"outliers/{self._outliers.name}/"
        step = self._outliers.interval.clock.step  # that of the record, whoever comes first
        self.history.add(step, {k.removeprefix(prefix): v for k, v in latest.items()})
        return True

    def words(self, trainer: pl.Trainer) -> str:
        """The newest means."""
        return self.history.in_words(self.measures)

    def figure(self) -> "Figure":
        """Means over the steps, and the newest value of every matrix."""
        return outlier_figure(self.history, self.measures)

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._restored = OutlierHistory(), True
        self.history.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for the callback of its own Trainer."""
        return {**super().__getstate__(), "_outliers": None}
