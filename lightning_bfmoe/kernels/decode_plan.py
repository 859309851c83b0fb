"""Decoding on CUDA: which passes a packed layer's rotations take, worked out once for its sizes."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.kernels.cuda_plan import Call, irregular_tables, multiprocessors

ONE_TILE = 8
"""A rotation of up to this many regular stages is done in one pass, a wider one in two."""
TILE = 128  # numbers of a tile, where a pass leaves the choice
FEW = 2
"""Most rows of a product that is summed without tensor cores."""
MAX_GATHERED = 3
"""Most irregular stages: each doubles the numbers that one number is made of."""


class Sizes(NamedTuple):
    """What the passes of one matrix depend on."""

    d_in: int
    d_out: int
    stages_in: int
    stages_out: int
    gain_in: bool
    gain_out: bool
    bias: bool
    by_row: bool  # a scale for each row of the matrix


class Tiles(NamedTuple):
    """How a rotation is cut: `regular` stages in segments, then `irregular` ones."""

    regular: int
    irregular: int
    lower: int
    """log2 of a block; stages from here on pair whole blocks."""

    @property
    def segments(self) -> list[tuple[bool, int, int]]:
        """(across blocks?, first stage, last + 1), in forward order."""
        parts = [(False, 0, self.lower), (True, self.lower, self.regular)]
        return [part for part in parts if part[1] < part[2]]


def tiles_of(width: int, stages: int) -> Tiles:
    """How a rotation of this width is cut into passes.

    Example:
        >>> tiles_of(256, 8), tiles_of(8192, 13), tiles_of(768, 10)
        (Tiles(regular=8, irregular=0, lower=8), Tiles(regular=13, irregular=0, lower=7), \
Tiles(regular=8, irregular=2, lower=8))
    """
    regular = min((width & -width).bit_length() - 1, stages)
    lower = regular if regular <= ONE_TILE else -(-regular // 2)
    return Tiles(regular, stages - regular, lower)


def is_cut(width: int, stages: int) -> bool:
    """Whether these passes can do the rotation."""
    tiles = tiles_of(width, stages)
    return tiles.regular > 0 and tiles.irregular <= MAX_GATHERED


def _tile(tiles: Tiles, upper: bool) -> int:
    """Numbers of a tile; it divides a block of 2^regular columns."""
    own = tiles.regular - tiles.lower if upper else tiles.lower
    least = 2 ** (own + 3) if upper else 2**own
    return min(max(least, TILE), 2**tiles.regular)


class Pass:
    """One launch of `triton_decode.pass_kernel`, without its addresses."""

    def __init__(self, width: int, tiles: Tiles, upper: bool, whole: bool = True) -> None:
        size = _tile(tiles, upper) if whole else 256
        self.width, self.upper, self.whole = width, upper, whole
        self.blocks = -(-width // size)
        self.combines = False
        self.constants: dict[str, Any] = {
            "WIDTH": width, "SIZE": 1 << (width - 1).bit_length(), "REGULAR": tiles.regular,
            "T": size, "UPPER": upper, "LOWER_BITS": tiles.lower, "SLOTS": 1, "TOKENS": False,
            "SPLITS": 1, "OUT_FIRST": 0, "OUT_STOP": 0, "OUT_STAGES": 0, "OUT_IRREGULAR": 0,
            "IN_FIRST": 0, "IN_STOP": 0, "IN_STAGES": 0, "IN_IRREGULAR": 0, "OUT_GAIN": False,
            "BIAS": False, "ACTIVATION": "", "GATE": False, "IN_GAIN": False, "COMBINE": False,
            "BLOCK_IN": 0,
        }  # fmt: skip

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Partners and pairs of the irregular stages, if this pass has any."""
        own = self.constants
        stages = own["OUT_STAGES"] if own["OUT_IRREGULAR"] else own["IN_STAGES"]
        if not own["OUT_IRREGULAR"] and not own["IN_IRREGULAR"]:
            return None
        return irregular_tables(self.width, stages, own["REGULAR"], device)

    def result(self, x: Tensor, rows: int) -> Tensor:
        """Where the pass writes."""
        block = self.constants["BLOCK_IN"] or 1
        return x.new_empty(rows, -(-self.width // block) * block, dtype=torch.float32)

    @functools.cached_property
    def call(self) -> Call:
        """The kernel; compiled when it is first called."""
        from lightning_bfmoe.kernels import triton_decode

        warps = min(max(self.constants["T"] // 256, 1), 8)
        return Call(triton_decode.pass_kernel, self.constants, num_warps=warps)


def passes_in(sizes: Sizes) -> list[Pass]:
    """B(theta)^T diag(gain): the last stages first."""
    tiles, found = tiles_of(sizes.d_in, sizes.stages_in), []
    for upper, first, stop in reversed(tiles.segments):
        one = Pass(sizes.d_in, tiles, upper)
        one.constants |= {"IN_FIRST": first, "IN_STOP": stop, "IN_STAGES": sizes.stages_in}
        found.append(one)
    found[0].constants |= {"IN_GAIN": sizes.gain_in, "IN_IRREGULAR": tiles.irregular}
    return found


def passes_out(sizes: Sizes) -> list[Pass]:
    """diag(gain) B(phi), then the bias."""
    tiles, found = tiles_of(sizes.d_out, sizes.stages_out), []
    for upper, first, stop in tiles.segments:
        one = Pass(sizes.d_out, tiles, upper)
        one.constants |= {"OUT_FIRST": first, "OUT_STOP": stop}
        found.append(one)
    if tiles.irregular:
        found.append(Pass(sizes.d_out, tiles, False, whole=False))
        found[-1].constants |= {"OUT_IRREGULAR": tiles.irregular}
    for one in found:
        one.constants["OUT_STAGES"] = sizes.stages_out
    found[-1].constants |= {"OUT_GAIN": sizes.gain_out, "BIAS": sizes.bias}
    return found


def join(out: list[Pass], into: list[Pass]) -> list[Pass]:
    """One list of passes; the last of one rotation and the first of the next at one go if it fits.

    They must cut the row alike, and a stage that gathers from the whole row needs it written first.
    """
    last, first = out[-1], into[0]
    same = ("WIDTH", "REGULAR", "T", "UPPER", "LOWER_BITS")
    if first.constants["IN_IRREGULAR"] or any(
        last.constants[name] != first.constants[name] for name in same
    ):
        return out + into
    for name in ("IN_FIRST", "IN_STOP", "IN_STAGES", "IN_GAIN"):
        last.constants[name] = first.constants[name]
    return out + into[1:]


class Shape(NamedTuple):
    """How a product is spread over the GPU."""

    block_rows: int  # rows of a program
    block_out: int  # outputs of a program
    block_in: int  # inputs at a time
    splits: int  # programs that share the inputs of a block of outputs
    warps: int
    few: bool  # by `few_kernel`


def product_shape(d_in: int, d_out: int, rows: int, programs: int) -> Shape:
    """The shape for at least about as many programs as the GPU has multiprocessors.

    Measured on an H100, see docs/benchmarks.md.
    """
    if rows <= FEW:
        beside = min(64, 1 << (words_a_row(d_in) - 1).bit_length())
        return Shape(rows, 2048 // beside, 16 * beside, -(-d_in // (16 * beside)), 4, True)
    splits = max(1, min(programs // -(-d_out // 128), -(-d_in // 128) // 2, 8))
    return Shape(max(16, 1 << (rows - 1).bit_length()), 128, 128, splits, 8, False)


class Product:
    """The launch of a kernel of `triton_ternary` for one matrix and up to `rows` rows."""

    def __init__(self, sizes: Sizes, rows: int, terms: int, device: torch.device) -> None:
        shape = product_shape(sizes.d_in, sizes.d_out, rows, multiprocessors(device))
        self.shape, self.d_out, self.splits = shape, sizes.d_out, shape.splits
        self.reads = {"BLOCK_IN": shape.block_in if shape.few else 0}
        self.constants = {
            "D_IN": sizes.d_in, "D_OUT": sizes.d_out, "WORDS": words_a_row(sizes.d_in),
            "BY_ROW": sizes.by_row, "SPLITS": shape.splits, "TERMS": terms,
            "BLOCK_ROWS": shape.block_rows, "BLOCK_OUT": shape.block_out,
            "BLOCK_IN": shape.block_in,
        }  # fmt: skip

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Programs for this many rows."""
        blocks = -(-self.d_out // self.shape.block_out)
        return blocks, self.splits, -(-rows // self.shape.block_rows)

    @functools.cached_property
    def call(self) -> Call:
        """The kernel; compiled when it is first called."""
        from lightning_bfmoe.kernels import triton_ternary

        kernel = triton_ternary.few_kernel if self.shape.few else triton_ternary.ternary_kernel
        return Call(kernel, self.constants, num_warps=self.shape.warps, num_stages=3)


def words_a_row(d_in: int) -> int:
    """32-bit words of a row of the matrix, 16 trits each."""
    return -(-d_in // 16)


class LayerPlan:
    """All launches of a packed layer.

    `inner` holds, of gate (if gated) and up, the passes of the token's rotation, the product, and
    the passes that follow; those of the last one run on to the input rotation of `down`. `down`
    holds its product and the passes behind it.
    """

    def __init__(
        self, up: Sizes, gate: Sizes | None, down: Sizes, activation: str, slots: int, rows: int,
        terms: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.inner: list[tuple[list[Pass], Product, list[Pass]]] = []
        for role, sizes in (("gate", gate), ("up", up)):
            if sizes is None:
                continue
            before, behind = passes_in(sizes), passes_out(sizes)
            before[0].constants |= {"TOKENS": True, "SLOTS": slots}
            product = Product(sizes, rows, terms, device)
            behind[0].constants["SPLITS"] = product.splits
            if role == "up" and gate is not None:
                behind[-1].constants["GATE"] = True
            else:
                behind[-1].constants["ACTIVATION"] = activation
            if role == "up":
                behind = join(behind, passes_in(down))
            before[-1].constants |= product.reads
            self.inner.append((before, product, behind))
        product, behind = Product(down, rows, terms, device), passes_out(down)
        self.inner[-1][2][-1].constants |= product.reads
        behind[0].constants["SPLITS"] = product.splits
        behind[-1].constants |= {"COMBINE": True, "SLOTS": slots}
        self.down = product, behind


@functools.lru_cache(maxsize=256)
def plan_for(
    up: Sizes, gate: Sizes | None, down: Sizes, activation: str, slots: int, block_rows: int,
    terms: int, device: torch.device, *dtypes: torch.dtype,
) -> LayerPlan:  # fmt: skip
    """The plan of these sizes; a plan compiles for one set of dtypes."""
    return LayerPlan(up, gate, down, activation, slots, block_rows, terms, device)
