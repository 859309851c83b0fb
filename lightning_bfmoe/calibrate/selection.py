"""The report of a selection: every submodule, what each option would lose, and what was chosen."""

import dataclasses
import io
import itertools
from dataclasses import dataclass, field
from typing import Any

COLOURS = {
    "keep": "tab:gray",
    "butterfly": "tab:orange",
    "bypass": "tab:blue",
    "remove": "tab:red",
}


CORRECTED = ("tab:brown", "tab:pink", "tab:olive")
"""Colours of ButterflyMoE layers with corrections, by their ranks."""


def kind_of(name: str) -> str:
    """The option that a chosen name belongs to.

    Example:
        >>> kind_of("butterfly+8"), kind_of("butterfly"), rank_of("butterfly+8")
        ('corrected', 'butterfly', 8)
    """
    return "corrected" if "+" in name else name


def rank_of(name: str) -> int:
    """Rank of the correction in a chosen name; 0 without one."""
    return int(name.partition("+")[2] or 0)


@dataclass
class Ranked:
    """One submodule of a model.

    Args:
        path: Of the module.
        kind: "feed-forward" or "attention".
        chosen: Name of the option that it got.
        size_before: Bytes of its weights as they were held.
        size_after: Bytes of what it got; packed for a ButterflyMoE layer.
        eps: By option: held-out error in the residual stream, E|F - G|^2 / |r + F|^2.
        sizes: By option: bytes.
        one_minus_cosine: Mean of 1 - cos(r, r + F).
        norm_ratio: Mean of |F| / |r|.
        linear_error: What a full linear map of its input misses, over the variance of F (weighted).
        canonical_bound: NBL's bound over the variance of F + x; a sum over directions, 0 to d.
        note: Why it was kept, if it could not be replaced; or that it has no norm before it.
    """

    path: str
    kind: str
    chosen: str = "keep"
    size_before: int = 0
    size_after: int = 0
    eps: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    one_minus_cosine: float = float("nan")
    norm_ratio: float = float("nan")
    linear_error: float = float("nan")
    canonical_bound: float = float("nan")
    note: str = ""


@dataclass
class SelectionReport:
    """What `selected_swap` chose and did; `print` it for a table, `figure()` for a picture.

    Args:
        submodules: All of them, in the model's order.
        limit: The budget or sparsity in words.
        shared_rank: Rank of the basis that feed-forward bypasses share; 0 when there is none.
        swap: The report of the exchange, for `restore` and checkpoints (`swap.plan()`).
        skipped: Path, status and reason of feed-forward blocks that were not ranked.
    """

    submodules: list[Ranked] = field(default_factory=list)
    limit: str = ""
    shared_rank: int = 0
    shared_bytes: int = 0
    swap: Any = None
    skipped: list[dict[str, str]] = field(default_factory=list)

    def plan(self) -> dict[str, Any]:
        """The exchange as plain data, for `swap.apply_swap_plan`."""
        return self.swap.plan()  # type: ignore[no-any-return]

    def totals(self) -> dict[str, float]:
        """Bytes before and after, and the sum of the chosen options' eps."""
        rows = self.submodules
        return {
            "size_before": sum(r.size_before for r in rows),
            "size_after": sum(r.size_after for r in rows) + self.shared_bytes,
            "eps": sum(r.eps.get(r.chosen, 0.0) for r in rows),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (JSON-safe)."""
        rows = [
            {k: None if v != v else v for k, v in dataclasses.asdict(r).items()}
            for r in self.submodules
        ]
        return {
            "limit": self.limit,
            "shared_rank": self.shared_rank,
            "shared_bytes": self.shared_bytes,
            "submodules": rows,
            "skipped": [dict(row) for row in self.skipped],
            "totals": self.totals(),
        }

    def _options(self) -> list[str]:
        """Names of the options that were offered, `keep` left out."""
        found = {name: None for r in self.submodules for name in r.eps if name != "keep"}
        order = ("butterfly", "bypass", "remove")

        def place(name: str) -> tuple[int, int]:
            kind, _, rank = name.partition("+")
            return order.index(kind), int(rank or 0)

        return sorted(found, key=place)

    def __rich__(self) -> Any:
        """A rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        totals = self.totals()
        caption = (
            f"{self.limit}; {_mb(totals['size_before'])} > {_mb(totals['size_after'])} MB\n"
            "by option: eps, held-out squared error over the residual stream's square behind it; "
            "1-cos, |F|/|r|: mean; linear: what a full linear map misses of F"
        )
        groups: dict[str, list[str]] = {}
        for r in self.submodules:
            if r.note and len(r.eps) < 2:
                groups.setdefault(r.note, []).append(r.path)
        for row in self.skipped:
            reason = ": ".join(filter(None, ("not ranked", row["status"], row["reason"])))
            groups.setdefault(reason, []).append(row["path"])
        for note, paths in groups.items():
            others = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
            caption += f"\nkept: {', '.join(paths[:2])}{others}: {note}"
        names = self._options()
        table = Table(title="Selection", caption=caption, box=SIMPLE_HEAD)
        heads = [n[n.index("+") :] if "+" in n else n for n in names]  # "+8" behind "butterfly"
        columns = ("submodule", "chosen", "MB", *heads)
        for name in (*columns, "1-cos", "|F|/|r|", "linear"):
            left = name in ("submodule", "chosen")
            justify: Any = "left" if left else "right"
            table.add_column(name, justify=justify, no_wrap=left, min_width=len(name))
        for r in self.submodules:
            eps = [f"{r.eps[n]:.4f}" if n in r.eps else "-" for n in names]
            numbers = (r.one_minus_cosine, r.norm_ratio, r.linear_error)
            cells = ["-" if v != v else f"{v:.3f}" for v in numbers]
            size = _mb(r.size_before)
            size += "" if r.chosen == "keep" else f" > {_mb(r.size_after)}"
            table.add_row(r.path, r.chosen, size, *eps, *cells)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, force_jupyter=False, width=130).print(self)
        return out.getvalue().rstrip("\n")

    def figure(self) -> Any:
        """A matplotlib figure: eps of every option by depth, the chosen ones filled.

        Two panels, feed-forward and attention; the axis is logarithmic.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        kinds = [k for k in ("feed-forward", "attention") if self._of(k)]
        figure = Figure(figsize=(10, 3 * max(1, len(kinds))), layout="constrained")
        for place, kind in enumerate(kinds, start=1):
            axes, more = figure.add_subplot(len(kinds), 1, place), itertools.cycle(CORRECTED)
            rows = self._of(kind)
            for name in ("keep", *self._options()):
                colour = COLOURS.get(name) or next(more)
                points = [(i, r.eps[name]) for i, r in enumerate(rows) if r.eps.get(name, 0) > 0]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, "o-", color=colour, fillstyle="none", linewidth=0.7, label=name)
                taken = [(i, r.eps[name]) for i, r in enumerate(rows) if r.chosen == name != "keep"]
                if taken:
                    axes.plot(*zip(*taken, strict=True), "o", color=colour)
            for i, r in enumerate(rows):
                if r.chosen == "keep":
                    axes.axvline(i, color=COLOURS["keep"], alpha=0.25, linewidth=4)
            axes.set(yscale="log", ylabel="eps", title=f"{kind}, filled: chosen, gray: kept")
            axes.set_xlabel("place in the model")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        return figure

    def _of(self, kind: str) -> list[Ranked]:
        return [r for r in self.submodules if r.kind == kind]


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g}"
