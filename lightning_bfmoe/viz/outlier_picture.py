"""Outlier measures before and after the rotations: their history and its picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_bfmoe.viz.curves import Curves
from lightning_bfmoe.viz.png import PALETTE, make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS = {"before": PALETTE[1], "after": PALETTE[0], "hadamard": PALETTE[6]}
_LABELS = {
    "before": "before the rotation",
    "after": "after the learned rotation",
    "hadamard": "after a fixed Hadamard",
}
MAX_SITES = 24


class OutlierHistory:
    """Means over the steps, and the newest value of every matrix.

    Example:
        >>> history = OutlierHistory()
        >>> history.add(5, {"kurtosis_before": 9.0, "net.0.mlp/up/kurtosis_before": 9.0})
        >>> history.in_words(["kurtosis"])
        'step 5  kurtosis before 9'
    """

    def __init__(self) -> None:
        self.means = Curves()
        self.sites: dict[str, float] = {}
        self.step = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take in one record of `ActivationOutliers`, its names without their prefix."""
        self.step = step
        self.sites = {name: value for name, value in values.items() if "/" in name}
        for name, value in values.items():
            if "/" not in name:
                self.means.add(name, step, value)

    def in_words(self, measures: Sequence[str]) -> str:
        """The newest means in one line."""
        parts = [
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in self.means.latest().items()
            if name.rpartition("_")[0] in measures
        ]
        return "  ".join([f"step {self.step}", *parts])

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"means": self.means.state_dict(), "sites": dict(self.sites), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.means.load_state_dict(state["means"])
        self.sites, self.step = dict(state["sites"]), int(state["step"])


def outlier_figure(history: OutlierHistory, measures: Sequence[str]) -> "Figure":
    """Above, the mean over all matrices by step; beneath, the newest value of each matrix.

    Args:
        history: The records.
        measures: What to draw, one column each.
    """
    names = [name.rpartition("/")[0] for name in history.sites]
    sites = list(dict.fromkeys(names))
    shown = sites[:MAX_SITES]
    tall = 0.24 * max(4, len(shown)) + 0.8
    figure = make_figure(5.0 * len(measures), 2.6 + tall)
    grid = figure.subplots(
        2, len(measures), squeeze=False, gridspec_kw={"height_ratios": [2.6, tall]}
    )
    for column, measure in enumerate(measures):
        top, below = grid[:, column]
        for view, color in VIEWS.items():
            steps, values = history.means.points(f"{measure}_{view}")
            if steps:
                top.plot(steps, values, color=color, marker="o", ms=3, label=_LABELS[view])
            found = [history.sites.get(f"{site}/{measure}_{view}") for site in shown]
            rows = [i for i, value in enumerate(found) if value is not None]
            size = {"before": 6, "after": 6, "hadamard": 4}[view]
            below.plot([found[i] for i in rows], rows, "o", color=color, ms=size)
        top.set_title(f"{measure}, mean over all matrices", fontsize=9)
        top.set_xlabel("step", fontsize=8)
        more = f" ({len(sites) - len(shown)} more)" if len(sites) > len(shown) else ""
        below.set_title(f"{measure} at step {history.step}, each matrix{more}", fontsize=9)
        below.set_yticks(range(len(shown)), shown if column == 0 else [""] * len(shown))
        below.set_ylim(len(shown) - 0.5 if shown else 0.5, -0.5)
        for axes in (top, below):
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
        if not top.lines:
            top.text(0.5, 0.5, "waiting for the first record", ha="center", transform=top.transAxes)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure
