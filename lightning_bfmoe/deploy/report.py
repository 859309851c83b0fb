"""What a packed file holds, in numbers: counted part by part, and as the disk sees it."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from typing_extensions import Self

from lightning_bfmoe.deploy.coding import CODE_BITS, FLOAT_BITS
from lightning_bfmoe.deploy.devices import human_bytes
from lightning_bfmoe.deploy.format import Header, LayerRecord
from lightning_bfmoe.deploy.memory import FORMS, MemoryPlan, plan_memory


@dataclass(frozen=True)
class LayerSizes:
    """One packed layer and the bytes of its parts."""

    record: LayerRecord
    parts: dict[str, int]
    """Part (`format.PARTS`) -> bytes."""

    @property
    def bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def plan(self) -> MemoryPlan:
        """The same layer as dense, as standard MoE and as ours, by arithmetic."""
        config = self.record.config
        return plan_memory(
            config["d_model"],
            config["d_ff"],
            config["num_experts"],
            config.get("top_k", 1),
            d_out=config["d_out"],
            gated=config["gated"],
            bias=config["bias"],
            gains=config["gains"],
            stages=config["stages"],
            granularity=config["granularity"],
            down=config["down"],
            router=self.record.kind == "ButterflyMoE",
            angle_bits=(FLOAT_BITS | CODE_BITS)[self.record.angles],
            gain_bits=(FLOAT_BITS | CODE_BITS)[self.record.gains],
            correction_rank=config.get("correction_rank", 0),
            correction_bits=FLOAT_BITS[self.record.correction],
            router_bits=16 if self.record.router == "bfloat16" else 32,
            trit_bits=self.record.bits,
        )


@dataclass(frozen=True)
class PackedSummary:
    """What the header of a packed file tells; `rich.print` shows it as tables."""

    path: Path
    file_bytes: int
    """Size of the file on disk."""
    layers: list[LayerSizes]
    other_bytes: int
    """Tensors of the rest of the model, and the recorded example's."""
    tensors: int
    """Stored tensors (count); shared ones count once."""
    library: str
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, file_bytes: int, header: Header, sizes: Mapping[str, int]) -> Self:
        """Sums the sizes of the tensors by layer and part."""
        parts: dict[str | None, Counter[str]] = {layer.path: Counter() for layer in header.layers}
        parts[None] = Counter()
        for name, record in header.tensors.items():
            parts[record.layer][record.part] += sizes[name]
        layers = [LayerSizes(layer, dict(parts[layer.path])) for layer in header.layers]
        other = sum(parts[None].values())
        return cls(
            path, file_bytes, layers, other, len(sizes), header.library, dict(header.aliases)
        )

    @property
    def counted_bytes(self) -> int:
        """All tensors: the file without its header."""
        return self.layer_bytes + self.other_bytes

    @property
    def layer_bytes(self) -> int:
        """The packed layers' tensors."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def header_bytes(self) -> int:
        """What the file needs besides its tensors."""
        return self.file_bytes - self.counted_bytes

    def compared(self) -> dict[str, int]:
        """Bytes of all packed layers in each form of `memory.FORMS`; ours as stored."""
        result = {form: sum(layer.plan.bytes(form) for layer in self.layers) for form in FORMS}
        return result | {"butterfly": self.layer_bytes}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Two tables: the file part by part, and the packed layers against other forms."""
        yield self._parts_table()
        yield self._comparison_table()

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, force_jupyter=False, width=100).print(self)
        return out.getvalue().rstrip()

    def _parts_table(self) -> Table:
        title = f"{escape(self.path.name)}: {self.file_bytes:,} bytes on disk ({self.library})"
        for words in sorted({_stored_as(layer.record) for layer in self.layers}):
            title += f"\nlayers stored as {words}"
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("part", overflow="fold")
        for head in ("substrate", "angles", "gains", "router", "other", "bytes"):
            table.add_column(head, justify="right", no_wrap=True)
        for layer in self.layers:
            part = Counter(layer.parts)
            columns = (
                part["substrate"] + part["scales"],
                part["angles"],
                part["gains"],
                part["router"],
                part["bias"] + part["dense"] + part["correction"] + part["other"],
            )
            texts = [human_bytes(count) if count else "" for count in columns]
            table.add_row(escape(layer.record.path or "(root)"), *texts, f"{layer.bytes:,}")
        rest = ["", "", "", ""]
        table.add_row("rest", *rest, human_bytes(self.other_bytes), f"{self.other_bytes:,}")
        table.add_row("header", *rest, human_bytes(self.header_bytes), f"{self.header_bytes:,}")
        return table

    def _comparison_table(self) -> Table:
        table = Table(
            title=f"the {len(self.layers)} packed layer(s), counted",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("form")
        for head in ("bytes", "", "/ ours"):
            table.add_column(head, justify="right", no_wrap=True)
        for form, count in self.compared().items():
            ratio = "" if form == "butterfly" else f"{count / max(self.layer_bytes, 1):.2f}x"
            table.add_row(FORMS[form], f"{count:,}", human_bytes(count), ratio)
        return table


def _stored_as(record: LayerRecord) -> str:
    """Encodings in few words: trits, angles, router, gains and corrections where there are some."""
    gains = f", {record.gains} gains" if record.config["gains"] else ""
    rank = record.config.get("correction_rank", 0)
    beside = f", corrections of rank {rank} in {record.correction}" if rank else ""
    return f"{record.bits}-bit trits, {record.angles} angles, {record.router} router{gains}{beside}"


class PackReport(PackedSummary):
    """What `pack` wrote."""
