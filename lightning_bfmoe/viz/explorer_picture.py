"""The static twin of the explorer: heatmap, orbits and butterfly in one matplotlib figure."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bfmoe.functional.butterfly import stage_pairs
from lightning_bfmoe.viz.explorer_data import ExplorerData
from lightning_bfmoe.viz.orbits import MEASURES, TRAIL, Distances, distances, orbit
from lightning_bfmoe.viz.png import COLOR_A, COLOR_B, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNED = ["#0b4a9e", "#5e96d6", "#ececec", "#ee9b4e", "#a84300"]
LINE_MIDDLE = "#c0c4ca"  # a line needs more contrast to the page than a cell of a strip does


@dataclass(frozen=True)
class Selection:
    """What the explorer shows."""

    checkpoint: int
    """Index of the record."""
    layer: str
    """Path of the layer."""
    rotation: str
    """``up/in``, ``up/out``, ..."""
    a: int = 0
    """Expert A."""
    b: int = 1
    """Expert B."""
    stages: int = 1
    """Stages that are applied, >= 1."""
    scale: float = 1.0
    """Factor of every angle."""
    probe: int = 0
    """Which probe vector."""
    measure: str = "rotation"
    """A name in `orbits.MEASURES`."""
    show: str = "a"
    """Whose angles the butterfly shows: a, b, or gap (A - B)."""

    @classmethod
    def names(cls) -> list[str]:
        """Names of all fields."""
        return [item.name for item in fields(cls)]


def default_selection(data: ExplorerData) -> Selection:
    """The last record, the first rotation, experts 0 and 1, all stages."""
    layer, rotation = data.keys[0]
    experts, stages, _ = data.recording.snapshots[-1].angles[layer, rotation].shape
    last = len(data.recording) - 1
    return Selection(last, layer, rotation, b=min(1, experts - 1), stages=stages)


def selected_angles(data: ExplorerData, at: Selection) -> tuple[np.ndarray, np.ndarray, int]:
    """Angles of the chosen record and of the last one, and the width."""
    angles = data.recording.angles(at.layer, at.rotation)
    return angles[at.checkpoint], angles[-1], data.recording.widths[at.layer, at.rotation]


def selected_distances(data: ExplorerData, at: Selection) -> Distances:
    """What the heatmap shows."""
    angles, _, d = selected_angles(data, at)
    return distances(angles, d, at.measure, stages=at.stages, scale=at.scale)


def explorer_figure(data: ExplorerData, at: Selection | None = None) -> "Figure":
    """Heatmap of expert distances, orbits of a probe, and the butterfly of one expert.

    Example:
        >>> from lightning_bfmoe.layers import ButterflyMoE
        >>> data = ExplorerData.of(ButterflyMoE(8, 16, num_experts=4))
        >>> len(explorer_figure(data).axes)  # three pictures and two colour bars
        5

    Args:
        data: See `ExplorerData.of`.
        at: What to show; the last record when None.
    """
    at = default_selection(data) if at is None else at
    figure = make_figure(12.5, 4.1)
    left, middle, right = figure.subplots(1, 3)
    _heatmap(figure, left, data, at)
    _orbits(middle, data, at)
    _butterfly(figure, right, data, at)
    loss = data.recording.losses[at.checkpoint]
    words = "" if np.isnan(loss) else f", loss {loss:.3f}"
    figure.suptitle(
        f"{at.layer}, {at.rotation}: step {data.recording.steps[at.checkpoint]}{words}", fontsize=11
    )
    return figure


def _heatmap(figure: "Figure", axes: "Axes", data: ExplorerData, at: Selection) -> None:
    found = selected_distances(data, at)
    image = axes.imshow(found.values, cmap="cividis", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xlabel("expert B")
    axes.set_ylabel("expert A")
    for color, width in (("black", 4), ("white", 1.5)):  # seen on every colour beneath
        axes.plot([at.b], [at.a], "s", ms=9, mfc="none", mec=color, mew=width)
    error = f" ($D^2$ ± {found.standard_error:.3f})" if found.standard_error else ""
    axes.set_title(f"{MEASURES[at.measure]}\nmean {found.mean:.4f}{error}", fontsize=9)


def _orbits(axes: "Axes", data: ExplorerData, at: Selection) -> None:
    angles, last, d = selected_angles(data, at)
    probe = data.probe(d, at.probe)
    step: dict[str, Any] = {"stages": at.stages, "scale": at.scale}
    everybody = len(angles) * at.stages * d * TRAIL < 3e6
    trails = orbit(angles, last, probe, at.a, at.b, trail=everybody, **step)
    axes.plot(*trails.transpose(2, 1, 0), color="#8a9099", lw=0.6)
    axes.plot(*trails[:, -1].T, "o", color="#8a9099", ms=3)
    for expert, color, name in ((at.b, COLOR_B, "B"), (at.a, COLOR_A, "A")):
        (trail,) = orbit(angles, last, probe, at.a, at.b, experts=[expert], **step)
        axes.plot(*trail.T, color=color, lw=2)
        axes.plot(*trail[-1], "o", color=color, ms=7, label=f"{name}: expert {expert}")
    axes.plot([0], [0], "k+", ms=9)
    axes.annotate("probe", (0, 0), (4, -12), textcoords="offset points", fontsize=8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8)
    axes.set_title("orbit of a probe vector\n(unit: its length)", fontsize=9)


def _butterfly(figure: "Figure", axes: "Axes", data: ExplorerData, at: Selection) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    angles, _, d = selected_angles(data, at)
    gap = angles[at.a] - angles[at.b]
    gap = gap - 2 * np.pi * np.round(gap / (2 * np.pi))
    shown = at.scale * {"a": angles[at.a], "b": angles[at.b], "gap": gap}[at.show]
    stages, limit = len(shown), max(float(np.abs(shown).max()), 1e-3)
    scale = SIGNED if d > 32 else [*SIGNED[:2], LINE_MIDDLE, *SIGNED[3:]]
    colors = LinearSegmentedColormap.from_list("signed", scale)
    norm = Normalize(-limit, limit)
    first, second = (pairs.numpy() for pairs in stage_pairs(d, stages))
    if d <= 32:
        lines = [
            [(s + 0.5, start), (s + 1.5, end)]
            for s in range(stages)
            for i, j in zip(first[s], second[s], strict=True)
            for start, end in ((i, i), (i, j), (j, i), (j, j))
        ]
        values = np.repeat(shown.reshape(-1), 4)
        faint = [1.0 if s < at.stages else 0.25 for s in range(stages) for _ in range(4 * (d // 2))]
        axes.add_collection(
            LineCollection(lines, array=values, cmap=colors, norm=norm, lw=1.6, alpha=faint)
        )
        axes.set_xlim(0.4, stages + 0.6)
        axes.set_ylim(d - 0.5, -0.5)
    else:
        rows = min(d, 256)
        grid = np.zeros((rows, stages))
        for s in range(stages):
            at_rows = np.concatenate([first[s], second[s]]) * rows // d
            both = np.concatenate([shown[s], shown[s]])
            order = np.argsort(np.abs(both))  # the largest of a cell is written last
            grid[at_rows[order], s] = both[order]
        alpha = np.where(np.arange(stages) < at.stages, 1.0, 0.25)
        axes.imshow(
            grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest",
            extent=(0.5, stages + 0.5, d - 0.5, -0.5), alpha=np.broadcast_to(alpha, grid.shape),
        )  # fmt: skip
    axes.set_xticks(range(1, stages + 1))
    axes.set_xlabel("stage")
    axes.set_ylabel("coordinate")
    whose = {"a": f"expert {at.a}", "b": f"expert {at.b}", "gap": f"{at.a} minus {at.b}"}[at.show]
    axes.set_title(f"butterfly of {whose}\n(angles, rad)", fontsize=9)
    figure.colorbar(ScalarMappable(norm, colors), ax=axes, shrink=0.8)
