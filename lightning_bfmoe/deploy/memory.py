r"""Bytes of a feed-forward layer, counted part by part, in five forms side by side.

A layer of N experts on a shared ternary matrix of d_out x d_in costs

.. math:: \underbrace{d_{out} d_{in} \cdot b_T / 8}_{\text{substrate}} +
   \underbrace{4\,d_{out}}_{\text{row scales}} +
   N\,\big(\underbrace{S(d_{in})\lfloor d_{in}/2 \rfloor + S(d_{out})\lfloor d_{out}/2 \rfloor}_{
   \text{angles}}\big)\, b_\theta / 8

per matrix, plus gains, biases and the router, where S(d) is the number of butterfly stages and b
the bits of a trit and of an angle. Angles of 8 or 4 bit have a float16 scale per expert and stage
besides, int8 gains one per expert and side. Ratios are given against the fp32 standard MoE *and*
against one whose experts are ternary: the first flatters, the second is the fair opponent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_bfmoe.deploy.devices import device_bytes, human_bytes
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.butterfly import num_pairs, num_stages
from lightning_bfmoe.functional.codes import CODE_BITS, SCALE_BYTES, code_bytes
from lightning_bfmoe.functional.packing import packed_size
from lightning_bfmoe.layers.correction import correction_bytes

Parts = dict[str, float]
FORMS = {
    "dense_fp32": "dense fp32",
    "dense_ternary": "dense ternary",
    "moe_fp32": "MoE fp32",
    "moe_ternary": "MoE ternary",
    "butterfly": "ButterflyMoE",
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one layer, or of `layers` equal ones, in every form; see `plan_memory`."""

    settings: dict[str, Any]
    """The arguments of `plan_memory`."""
    parts: dict[str, Parts]
    """Form -> part -> bytes. Parts: substrate, scales, angles, gains, router, bias, weights, and
    correction."""
    layers: int = 1

    def bytes(self, form: str = "butterfly") -> int:
        """Total bytes of a form (one of `FORMS`), rounded to whole bytes."""
        return round(self.layers * sum(self.parts[form].values()))

    def ratio(self, against: str) -> float:
        """How many times smaller ours is than another form."""
        return self.bytes(against) / self.bytes("butterfly")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Prints the table; scales, gains and biases count with their left-hand neighbours."""
        table = Table(title=self._title(), box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("layers" if self.layers > 1 else "layer", no_wrap=True)
        for head in ("ternary", "angles", "router", "weights", "total", "/ ours"):
            table.add_column(head, justify="right", no_wrap=True)
        for form, label in FORMS.items():
            part = {name: value * self.layers for name, value in self.parts[form].items()}
            cells = [
                part.get("substrate", 0) + part.get("scales", 0),
                part.get("angles", 0) + part.get("gains", 0),
                part.get("router", 0) + part.get("bias", 0),
                part.get("weights", 0) + part.get("correction", 0),
            ]
            ratio = "" if form == "butterfly" else f"{self.ratio(form):.2f}x"
            texts = [human_bytes(cell) if cell else "" for cell in cells]
            table.add_row(label, *texts, human_bytes(self.bytes(form)), ratio)
        yield table

    def _title(self) -> str:
        get = self.settings.get
        return (
            f"d_model {get('d_model')}, d_ff {get('d_ff')}, {get('num_experts')} experts, "
            f"top-{get('top_k')}, {get('trit_bits')}-bit trits, {get('angle_bits')}-bit angles"
            + (f", {self.layers} layers" if self.layers > 1 else "")
        )


@dataclass(frozen=True)
class _Counter:
    """The sizes that the forms share; one method per kind of part."""

    matrices: list[tuple[int, int]]  # (d_out, d_in) of every matrix that is counted
    biases: list[int] = field(default_factory=list)
    bits: float = 1.6
    scale_rows: str | None = "row"
    router: int = 0  # fp32 numbers

    def weights(self, copies: int) -> Parts:
        numbers = sum(d_out * d_in for d_out, d_in in self.matrices)
        return {"weights": 4 * copies * numbers, "bias": 4 * copies * sum(self.biases)}

    def ternary(self, copies: int) -> Parts:
        size = sum(_trit_bytes(d_out * d_in, self.bits) for d_out, d_in in self.matrices)
        per_matrix = {
            "row": [d_out for d_out, _ in self.matrices],
            "tensor": [1] * len(self.matrices),
        }
        scales = sum(per_matrix[self.scale_rows]) if self.scale_rows else 0
        return {
            "substrate": copies * size,
            "scales": 4 * copies * scales,
            "bias": 4 * copies * sum(self.biases),
        }

    def rotations(self, experts: int, stages: int | None, row: Callable[[int], float]) -> float:
        widths = [width for matrix in self.matrices for width in matrix]
        limit = max(map(num_stages, widths)) if stages is None else stages
        return experts * sum(min(limit, num_stages(d)) * row(num_pairs(d)) for d in widths)

    def gains(self, experts: int, row: Callable[[int], float]) -> float:
        return experts * sum(row(width) for matrix in self.matrices for width in matrix)


def plan_memory(
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int = 2,
    *,
    gated: bool = False,
    matrices: int | None = None,
    angle_bits: int = 16,
    gain_bits: int | None = None,
    router_bits: int = 32,
    trit_bits: float | str = 1.6,
    gains: bool = False,
    layers: int = 1,
    stages: int | None = None,
    bias: bool = True,
    d_out: int | None = None,
    granularity: str = "row",
    down: str = "butterfly",
    router: bool = True,
    correction_rank: int = 0,
    correction_bits: int = 16,
    paper_convention: bool = False,
) -> MemoryPlan:
    """Counts the bytes of a feed-forward layer as dense, standard MoE and ButterflyMoE.

    Ours equals, byte for byte, the tensors that `pack` writes for such a layer.

    Example:
        >>> plan = plan_memory(512, 2048, 256, paper_convention=True)
        >>> round(plan.ratio("moe_fp32"), 2), round(plan.ratio("moe_ternary"), 2)
        (150.09, 7.41)

    Args:
        d_model: Width of the model.
        d_ff: Hidden width.
        num_experts: Experts per layer.
        top_k: Experts that a token visits; stated in the table, no byte depends on it.
        gated: Three matrices (gate, up, down) instead of two.
        matrices: Count only the first n of (up, down, gate); None: all that the layer has.
        angle_bits: Bits of a stored angle: 32, 16, 8 or 4 (with a scale per expert and stage).
        gain_bits: Bits of a stored gain: 32, 16 or 8. None: 32 beside angles of 32, else 16, as
            `pack` does.
        router_bits: 32, or 16 for `pack(rest="bf16")`; of our router only.
        trit_bits: 1.6 (five trits a byte) or 2; the paper's 1.58 only with `paper_convention`.
        gains: Per-expert diagonal gains.
        layers: Equal layers to add up.
        stages: Stages per rotation; None: all.
        bias: One bias per matrix, shared by our experts, one per expert in a standard MoE.
        d_out: Width of the result; None: `d_model`.
        granularity: One ternary scale a `row` or a `tensor`.
        down: `dense` when our second matrix is one shared fp32 projection (preset `paper`).
        router: Count the router's weight and balance bias, fp32, in every MoE.
        correction_rank: Rank of a low-rank correction beside our layer; counted with the weights.
        correction_bits: Bits of its stored factors: 16 or 32; their offset is fp32.
        paper_convention: Count as arXiv 2601.13563 does: ONE matrix of d_ff x d_model, 1.58 bit a
            trit, angles of 16 bit, no router, scale or bias. No real file is that small.

    Raises:
        ConfigError: A size is not positive, or a choice is unknown.
        ShapeError: A width below 2.
    """
    settings = dict(locals())
    for name in ("d_model", "d_ff", "num_experts", "top_k", "layers"):
        _check_count(name, settings[name])
    if stages is not None:
        _check_count("stages", stages)
    if top_k > num_experts:
        raise ConfigError(
            "top_k must be at most num_experts",
            got=f"top_k={top_k}, num_experts={num_experts}",
            fix=f"Use top_k={num_experts} or fewer.",
        )
    choices = (
        ("granularity", ("row", "tensor")), ("down", ("butterfly", "dense")),
        ("angle_bits", (16, 32, 8, 4)), ("gain_bits", (None, 16, 32, 8)), ("router_bits", (32, 16)),
        ("correction_bits", (16, 32)),
    )  # fmt: skip
    gain_bits = max(16, angle_bits) if gain_bits is None else gain_bits
    row = _plain_row if paper_convention else _row
    for name, allowed in choices:
        if settings[name] not in allowed:
            raise ConfigError(
                f"{name} must be one of {allowed}",
                got=repr(settings[name]),
                fix=f"Use {name}={allowed[0]!r}.",
            )
    if paper_convention:
        settings |= {"trit_bits": 1.58, "matrices": 1}
        counter = _Counter([(d_ff, d_model)], bits=1.58, scale_rows=None)
    else:
        d_out = d_model if d_out is None else d_out
        _check_count("d_out", d_out)
        shapes = [(d_ff, d_model), (d_out, d_ff), (d_ff, d_model)][: 3 if gated else 2]
        if matrices is not None:
            _check_count("matrices", matrices)
            shapes = shapes[:matrices]
        rows = [shape[0] for shape in shapes] if bias else []
        routing = num_experts * (d_model + 1) if router else 0  # weight and balance bias
        counter = _Counter(shapes, rows, _check_bits(trit_bits), granularity, routing)
    ours = counter
    if down == "dense" and len(counter.matrices) > 1:
        ours = replace(counter, matrices=[counter.matrices[0], *counter.matrices[2:]])
    angles = ours.rotations(num_experts, stages, lambda numbers: row(numbers, angle_bits))
    packed = ours.ternary(1) | {"angles": angles}
    if gains:
        width = gain_bits
        packed["gains"] = ours.gains(num_experts, lambda numbers: row(numbers, width))
    if ours is not counter:
        packed["weights"] = counter.weights(1)["weights"] - ours.weights(1)["weights"]
    if correction_rank and not paper_convention:
        _check_count("correction_rank", correction_rank)
        width = d_model if d_out is None else d_out
        packed["correction"] = correction_bytes(d_model, width, correction_rank, correction_bits)
    routed: Parts = {"router": 4 * counter.router}
    biases = num_experts if counter.router else 0  # always float32
    narrow: Parts = {"router": (counter.router - biases) * router_bits / 8 + 4 * biases}
    parts = {
        "dense_fp32": counter.weights(1),
        "dense_ternary": counter.ternary(1),
        "moe_fp32": counter.weights(num_experts) | routed,
        "moe_ternary": counter.ternary(num_experts) | routed,
        "butterfly": packed | narrow,
    }
    return MemoryPlan(settings, parts, layers)


def experts_that_fit(
    device: str | int, d_model: int, d_ff: int, *, share: float = 1.0, **settings: Any
) -> dict[str, int]:
    """How many experts per layer a device's RAM holds, in each MoE form.

    Example:
        >>> fit = experts_that_fit("jetson-nano", 4096, 16384)
        >>> fit["moe_fp32"], fit["moe_ternary"], fit["butterfly"]
        (7, 158, 7442)

    Args:
        device: A name of `DEVICES`, or bytes.
        d_model: Width of the model.
        d_ff: Hidden width.
        share: Part of the RAM that the experts may take, in (0, 1].
        **settings: As in `plan_memory`, `layers=` included.

    Raises:
        ConfigError: The device is unknown or `share` out of range.
    """
    if not 0 < share <= 1:
        raise ConfigError("share must lie in (0, 1]", got=share, fix="Use share=1.0 for all of it.")
    room = device_bytes(device) * share
    settings = settings | {"top_k": 1}
    one, two = (plan_memory(d_model, d_ff, count, **settings) for count in (1, 2))
    result = {}
    for form in ("moe_fp32", "moe_ternary", "butterfly"):
        first, second = (plan.layers * sum(plan.parts[form].values()) for plan in (one, two))
        result[form] = max(0, int((room - (2 * first - second)) // (second - first)))
    return result


def _row(numbers: int, bits: int) -> float:
    """Bytes of a stored row of angles or gains, its scale included."""
    return code_bytes(numbers, bits) + SCALE_BYTES if bits in CODE_BITS else numbers * bits / 8


def _plain_row(numbers: int, bits: int) -> float:
    """The same without scales and whole bytes, as the paper counts."""
    return numbers * bits / 8


def _trit_bytes(numel: int, bits: float) -> float:
    if bits == 1.58:
        return numel * 1.58 / 8
    return packed_size(numel, f"{bits:g}")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name} must be a count >= 1", got=f"{name}={value!r}", fix="Use 1 or more."
        )


def _check_bits(bits: float | str) -> float:
    if f"{bits}" not in ("1.6", "2", "2.0"):
        raise ConfigError(
            "trit_bits must be 1.6 or 2",
            got=repr(bits),
            fix="Use 1.6; 1.58 exists in no file, only with paper_convention=True.",
        )
    return float(bits)
