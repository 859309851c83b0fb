"""The receipt of a swap: what was exchanged, what it costs and saves, and how to undo it."""

import dataclasses
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_bfmoe.functional.butterfly import check_stages, num_pairs, num_stages
from lightning_bfmoe.functional.packing import packed_size
from lightning_bfmoe.layers.correction import correction_bytes
from lightning_bfmoe.layers.surgery import Replaced, ReplacementPlan

PLAN_VERSION = 1


@dataclass
class SwappedBlock:
    """One exchanged feed-forward block; sizes in bytes, counts in numbers."""

    path: str
    owner: str
    family: str
    d_model: int
    d_ff: int
    d_out: int
    gated: bool
    activation: str
    num_experts: int
    places: int
    """Slots that share this one layer (count)."""
    own_router: bool
    """Whether the model's router is kept, and only its experts were exchanged."""
    parameters_before: int
    bytes_before: int
    """The original's weights in the dtype in which they were held."""
    parameters_after: int
    packed_bytes: int
    """The packed layer: trits at 1.6 bit, scales, biases and router fp32, angles and gains fp16."""
    relative_error: float | None = None
    """RMS error right after the swap, at the present lambda: on random rows, or on held-out tokens
    where the swap was calibrated; None in a dry run."""
    expert_error: float | None = None
    """Relative error of distinct experts' matrices on one substrate; None for dense blocks."""


@dataclass
class SwapReport:
    """What `swap_feed_forward` did; `print` it for a table, give it to `restore` to undo the swap.

    The original modules are held here and not in the model, so that they appear neither in its
    parameters nor in its state_dict. A pickled or copied report leaves them behind.

    Args:
        blocks: The exchanged blocks, in the model's order.
        skipped: Path, status and reason of what was seen and left alone.
        dry_run: Whether the model was left as it was.
        calibration: What a calibration chose (`calibrate.CalibrationReport`); None without one.
    """

    blocks: list[SwappedBlock] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    dry_run: bool = False
    placements: list[ReplacementPlan] = field(default_factory=list)
    receipts: list[tuple[Any, Replaced]] = field(default_factory=list)
    calibration: Any = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __bool__(self) -> bool:
        return True  # also the report of a swap that had nothing left to do

    def plan(self) -> dict[str, Any]:
        """The surgery as plain data (JSON-safe), for `apply_swap_plan`."""
        return {"version": PLAN_VERSION, "replacements": [dict(entry) for entry in self.placements]}

    def totals(self) -> dict[str, int]:
        """Sums over all blocks: parameters and bytes, before and after."""
        names = ("parameters_before", "bytes_before", "parameters_after", "packed_bytes")
        return {name: sum(getattr(block, name) for block in self.blocks) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (JSON-safe)."""
        return {
            "dry_run": self.dry_run,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "skipped": [dict(row) for row in self.skipped],
            "totals": self.totals(),
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
        }

    def release(self) -> None:
        """Lets go of the originals and their memory; `restore` is not possible afterwards."""
        self.receipts.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the originals behind when copied or pickled."""
        return {**self.__dict__, "receipts": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SwapReport":
        return SwapReport(**{**self.__getstate__(), "blocks": list(self.blocks)})

    def __rich__(self) -> Any:
        """A rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = "ButterflyMoE swap" + (" (dry run: nothing was changed)" if self.dry_run else "")
        table = Table(title=title, show_footer=True, caption=_caption(self), box=SIMPLE_HEAD)
        table.padding = (0, 1, 0, 0)
        totals = self.totals()
        columns: list[tuple[str, Callable[[SwappedBlock], str], str]] = [
            ("block", _place, f"{len(self.blocks)} blocks"),
            ("widths", _widths, ""),
            ("experts", _experts, ""),
            ("parameters", _parameters, _parameters(totals)),
            ("bytes", lambda b: _size(b.bytes_before), _size(totals["bytes_before"])),
            ("packed", lambda b: _size(b.packed_bytes), _size(totals["packed_bytes"])),
            ("error", _error, ""),
        ]
        for name, _, foot in columns:
            right = name not in ("block", "widths")
            table.add_column(
                name, footer=foot, justify="right" if right else "left", overflow="fold"
            )
        for block in self.blocks:
            table.add_row(*(cell(block) for _, cell, _ in columns))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, force_jupyter=False, width=100).print(self)
        return out.getvalue().rstrip("\n")


def _place(block: SwappedBlock) -> str:
    return block.path + (f" (shared by {block.places} places)" if block.places > 1 else "")


def _widths(block: SwappedBlock) -> str:
    gate = ", gated" if block.gated else ""
    return f"{block.d_model}>{block.d_ff}>{block.d_out} {block.activation}{gate}"


def _experts(block: SwappedBlock) -> str:
    return str(block.num_experts) + (" (own router)" if block.own_router else "")


def _parameters(of: "SwappedBlock | dict[str, int]") -> str:
    before, after = _numbers(of, "parameters_before", "parameters_after")
    return f"{_count(before)} > {_count(after)}"


def _numbers(of: "SwappedBlock | dict[str, int]", *names: str) -> list[int]:
    return [of[name] if isinstance(of, dict) else getattr(of, name) for name in names]


def _error(block: SwappedBlock) -> str:
    return "-" if block.relative_error is None else f"{block.relative_error:.2%}"


def _caption(report: SwapReport) -> str:
    inputs = "random inputs" if report.calibration is None else "held-out tokens"
    lines = [
        "bytes: as held before; packed: 1.6-bit trits, fp16 angles;",
        f"error: of the block's output at lambda 1 (all ternary), on {inputs}",
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in report.skipped:
        groups.setdefault((row["status"], row["reason"]), []).append(row["path"])
    for (status, reason), paths in groups.items():
        more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        lines.append(
            f"left alone ({status}): {', '.join(paths[:2])}{more}"
            + (f": {reason}" if reason else "")
        )
    return "\n".join(lines)


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _size(number: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"


def layer_sizes(settings: dict[str, Any], router: bool) -> tuple[int, int]:
    """Parameters and packed bytes of a layer with these settings, by formula.

    Args:
        settings: Keyword arguments of `ButterflyMoE` or `ButterflyExperts`, all of them.
        router: Whether the layer has a router of its own.

    Returns:
        Numbers that train, and bytes with trits at 1.6 bit, angles, gains and the factors of a
        correction in fp16, the rest fp32.
    """
    s, experts = settings, settings["num_experts"]
    shapes = [(s["d_ff"], s["d_model"])] * (2 if s["gated"] else 1)
    dense = s["down"] == "dense"
    shapes += [] if dense else [(s["d_out"], s["d_ff"])]
    parameters = experts * s["d_model"] if router else 0
    size = 4 * (parameters + experts) if router else 0  # weight and balance bias
    if dense:
        numbers = s["d_ff"] * s["d_out"] + (s["d_out"] if s["bias"] else 0)
        parameters, size = parameters + numbers, size + 4 * numbers
    for rows, columns in shapes:
        angles = experts * sum(_angles(d, s["stages"]) for d in (rows, columns))
        gains = experts * (rows + columns) if s["gains"] else 0
        bias = rows if s["bias"] else 0
        parameters += rows * columns + angles + gains + bias
        scales = rows if s["granularity"] == "row" else 1
        size += packed_size(rows * columns) + 4 * (scales + bias) + 2 * (angles + gains)
    if router and (rank := s["correction_rank"]):
        parameters += rank * (s["d_model"] + s["d_out"] + 1)
        size += correction_bytes(s["d_model"], s["d_out"], rank)
    return parameters, size


def _angles(d: int, stages: int | None) -> int:
    return num_pairs(d) * (num_stages(d) if stages is None else min(stages, check_stages(d, None)))


def skipped_rows(candidates: Iterable[Any]) -> list[dict[str, str]]:
    """Candidates that were left alone, as plain data."""
    return [{"path": c.path, "status": c.status, "reason": c.reason} for c in candidates]
