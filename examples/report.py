"""The end of the quickstart: one table and one figure, from records alone."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

# Okabe and Ito's colours, told apart by colour-blind readers; line styles repeat the difference
STYLES = {
    "dense": ("#000000", "-"),
    "ternary dense": ("#E69F00", "--"),
    "standard MoE": ("#0072B2", "-."),
    "ternary MoE": ("#CC79A7", ":"),
    "ButterflyMoE": ("#009E73", "-"),
}


def human_bytes(count: int) -> str:
    """Bytes in decimal units.

    Example:
        >>> human_bytes(950), human_bytes(125_344), human_bytes(16_875_520)
        ('950 B', '125.3 kB', '16.88 MB')
    """
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def results_table(rows: dict[str, dict[str, Any]]) -> Table:
    """One row per model; losses in nats per token on the held-out documents."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("feed-forward", no_wrap=True)
    for head in (
        "FFN bytes,\ncounted",
        "file on\ndisk",
        "loss before\nthe swap",
        "right\nafter it",
        "after\ntraining",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            human_bytes(row["ffn_bytes"]),
            human_bytes(row["file_bytes"]),
            *(f"{row[column]:.4f}" for column in ("val_before", "val_after_swap", "val_final")),
            style="bold" if name == "ButterflyMoE" else None,
        )
    return table


def save_figure(
    path: Path, base: dict[str, Any], rows: dict[str, dict[str, Any]], title: str
) -> None:
    """Draw loss, lambda and expert load; written whole or not at all."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    grid = figure.add_gridspec(4, 1, height_ratios=[2.4, 1.8, 0.8, 1.6])
    loss, gap, blend, load = (figure.add_subplot(grid[index]) for index in range(4))
    figure.suptitle(title, fontsize=11)
    _draw_loss(loss, base["train_loss"], rows)
    _draw_gap(gap, rows)
    _draw_blend(blend, rows)
    _draw_load(figure, load, rows["ButterflyMoE"]["load"])
    steps = len(rows["ButterflyMoE"]["load"])
    for axes in (gap, blend, load):
        axes.set_xlim(-0.5, steps - 0.5)
    for axes in (gap, blend):
        axes.tick_params(labelbottom=False)
    load.set_xlabel("training step after the swap")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=130)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_loss(axes: Any, base: list[float], rows: dict[str, dict[str, Any]]) -> None:
    level = _smooth(base)
    axes.plot(range(-len(base), 0), level, color="0.6", label="dense, before the swap")
    for name, row in rows.items():
        color, line = STYLES[name]
        curve = _smooth(row["train_loss"], start=level[-1])
        axes.plot(range(len(curve)), curve, line, color=color, label=name)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_ylabel("training loss,\nnats per token, smoothed")
    axes.set_xlabel("training step; 0 is the swap")
    axes.set_ylim(min(level[-1], *curve) - 0.4, level[0] + 0.1)
    axes.legend(fontsize=8, ncols=2)


def _draw_gap(axes: Any, rows: dict[str, dict[str, Any]]) -> None:
    """All saw the same tokens at each step, so differences show what five noisy curves hide."""
    dense = rows["dense"]
    for name, row in rows.items():
        color, line = STYLES[name]
        gap = [a - b for a, b in zip(row["train_loss"], dense["train_loss"], strict=True)]
        axes.plot(_smooth(gap, start=0.0), line, color=color, label=name)
        axes.plot(len(gap) - 1, row["val_final"] - dense["val_final"], "o", color=color, ms=5)
    axes.set_ylabel("loss minus dense's\n(lines: training, smoothed;\ndots: held-out, at the end)")
    axes.legend(fontsize=8, ncols=2, loc="upper left")


def _draw_blend(axes: Any, rows: dict[str, dict[str, Any]]) -> None:
    color, _ = STYLES["ButterflyMoE"]
    axes.plot(rows["ButterflyMoE"]["blend"], color=color)
    axes.set_ylabel("ternary\nblend $\\lambda$")
    axes.set_ylim(-0.05, 1.05)


def _draw_load(figure: Figure, axes: Any, load: list[list[float]]) -> None:
    shares = list(zip(*load, strict=True))  # [experts][steps]
    image = axes.imshow(
        shares, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest"
    )
    axes.set_ylabel("expert of the\nlast layer")
    axes.set_yticks(range(len(shares)) if len(shares) <= 16 else [0, len(shares) - 1])
    figure.colorbar(image, ax=axes, label="load (1 = even)", pad=0.01)


def _smooth(values: list[float], start: float | None = None, keep: float = 0.9) -> list[float]:
    """Exponential average, so that five noisy curves stay apart."""
    level, out = values[0] if start is None else start, []
    for value in values:
        level = keep * level + (1 - keep) * value
        out.append(level)
    return out
