"""Values over steps: bounded, plain data, and their chart."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bfmoe.viz.png import PALETTE, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 6
_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[_/.-]|_(step|epoch)$")


class Curves:
    """Named series of (step, value) that never grow beyond a number of points.

    A full series is halved by taking the mean of each two neighbours.

    Example:
        >>> curves = Curves(max_points=4)
        >>> for step in range(1, 6):
        ...     curves.add("loss", step, float(step))
        >>> curves.points("loss")
        ([2.0, 4.0, 5.0], [1.5, 3.5, 5.0])

    Args:
        max_points: Points of one series (count, even).
    """

    def __init__(self, max_points: int = 1000) -> None:
        self.max_points = max_points
        self._series: dict[str, list[tuple[float, float]]] = {}

    def add(self, name: str, step: float, value: float) -> None:
        """Add a point; NaN and infinite values leave a gap."""
        series = self._series.setdefault(name, [])
        if len(series) >= self.max_points:
            pairs = zip(series[0::2], series[1::2], strict=False)
            series[:] = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
        series.append((float(step), float(value)))

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one series."""
        series = self._series.get(name, [])
        return [step for step, _ in series], [value for _, value in series]

    @property
    def names(self) -> list[str]:
        """Names in the order in which they came."""
        return list(self._series)

    def latest(self) -> dict[str, float]:
        """The newest value of each series."""
        return {name: series[-1][1] for name, series in self._series.items() if series}

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Plain data."""
        return {name: [list(point) for point in series] for name, series in self._series.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._series = {name: [(p[0], p[1]) for p in series] for name, series in state.items()}


def panels_of(names: list[str]) -> dict[str, list[str]]:
    """Names by panel: those that differ only by train/val/test share one.

    Example:
        >>> panels_of(["train_loss", "val_loss", "val/acc"])
        {'loss': ['train_loss', 'val_loss'], 'acc': ['val/acc']}
    """
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(_STAGE.sub("", _STAGE.sub("", name)), []).append(name)
    return panels


def curves_figure(curves: Curves, title: str = "") -> "Figure":
    """One panel per kind of value, training and validation together.

    Args:
        curves: The values.
        title: Above all panels.
    """
    panels = list(panels_of(curves.names).items())
    shown = panels[:MAX_PANELS]
    columns = max(1, min(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = make_figure(4.2 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (label, names) in zip(grid, shown, strict=False):
        _draw(axes, curves, label, names)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    if not shown:
        grid[0].text(0.5, 0.5, "waiting for the first step", ha="center", va="center")
    if len(panels) > MAX_PANELS:
        left_out = ", ".join(label for label, _ in panels[MAX_PANELS:])
        title += f"  (not shown: {left_out[:80]})"
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def _draw(axes: "Axes", curves: Curves, label: str, names: list[str]) -> None:
    for name, color in zip(names, PALETTE * len(names), strict=False):
        steps, values = (np.asarray(part) for part in curves.points(name))
        if len(steps) > 60:  # a noisy curve: the points, and their mean over time
            axes.plot(steps, values, color=color, lw=0.6, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, lw=1.6, label=name)
        else:
            axes.plot(steps, values, color=color, lw=1.4, marker="o", ms=2.5, label=name)
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over the neighbours on both sides, about a share of all points; NaN is left out.

    Example:
        >>> smooth(np.array([1.0, 2.0, np.nan, 4.0]), share=0.7).tolist()
        [1.5, 1.5, 3.0, 4.0]
    """
    window = np.ones(2 * int(share * len(values) / 2) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def in_words(curves: Curves, step: int) -> str:
    """The newest values in one line."""
    values = "  ".join(f"{name} {value:.4g}" for name, value in curves.latest().items())
    return f"step {step}  {values}".rstrip()
