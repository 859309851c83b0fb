"""What a calibration did, block by block: for reading, and as plain data."""

import dataclasses
import io
from dataclasses import dataclass, field
from typing import Any

from lightning_bfmoe.calibrate.feed_forward import BlockFit


@dataclass
class CalibrationReport:
    """Choices and held-out errors of all blocks; `print` it for a table.

    Args:
        blocks: In the order in which they were fitted.
        passes: Forward passes over the data (count).
        seconds: Wall time.
        sequential: Whether later blocks saw what earlier ones had become.
    """

    blocks: list[BlockFit] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0
    sequential: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (JSON-safe)."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Any:
        """A rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        caption = (
            f"{self.passes} passes over the data, {self.seconds:.0f} s\n"
            "errors: squared, relative, on held-out tokens; output: of the whole block, centred"
        )
        if any(block.by_rank for block in self.blocks):
            caption += "; a > b: without and with its low-rank correction"
        table = Table(title="Calibration", caption=caption, box=SIMPLE_HEAD)
        for name in ("block", "tokens", "up", "gate", "down", "ridge", "output"):
            table.add_column(name, justify="left" if name == "block" else "right", overflow="fold")
        for block in self.blocks:
            cells = [_choice(block, role) for role in ("up", "gate", "down")]
            ridge = "-" if block.ridge is None else f"{block.ridge:g}"
            error = f"{block.error:.3f}"
            if block.by_rank:
                error = f"{block.by_rank[0]:.3f} > {error}"
            table.add_row(block.path, str(block.tokens), *cells, ridge, error)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, force_jupyter=False, width=120).print(self)
        return out.getvalue().rstrip("\n")


def _choice(block: BlockFit, role: str) -> str:
    choice = block.choices.get(role)
    if choice is None:
        return "-"
    basis = choice.basis + (" eq" if choice.equalized else "")
    return basis if role == "down" else f"{basis} {choice.error:.3f}"
