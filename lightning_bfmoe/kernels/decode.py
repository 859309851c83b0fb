"""The op "experts of a packed layer for a few rows": from its parts, or fused on CUDA."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bfmoe.functional.packing import pack_trits, unpack_trits
from lightning_bfmoe.kernels.cuda import has_triton, missing_triton, on_device
from lightning_bfmoe.kernels.cuda_plan import Call
from lightning_bfmoe.kernels.decode_plan import (
    Pass,
    Product,
    Sizes,
    is_cut,
    plan_for,
    words_a_row,
)
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.linear import PackedLinear

MAX_ROWS = 64
"""Most rows (tokens times experts each); with more the rotations and products of many rows pay."""
MAX_WIDTH = 1 << 17  # 32-bit offsets within a row's angles
FUSED_ACTIVATIONS = (
    "gelu", "gelu_tanh", "silu", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "identity",
)  # fmt: skip
"""Those that `triton_decode` knows by name."""

_words = WeakTensorKeyDictionary()


def packed_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    linears: tuple[PackedLinear, PackedLinear | None, PackedLinear],
    activation: str,
    parts: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    r"""Weighted sum of the chosen experts of a packed layer.

    .. math:: y_t = \sum_j w_{tj}\, W^{down}_{e_{tj}}\, a(W^{up}_{e_{tj}} x_t)

    Args:
        x: Tokens, (tokens, d_model), any floating dtype.
        experts: Chosen expert ids, (tokens, k) int64.
        weights: Their weights, (tokens, k).
        linears: The matrices up, gate (or None) and down.
        activation: Name of a in `layers.activation`.
        parts: Computes the same from its parts; called where no fused kernel suits.

    Returns:
        (tokens, d_out) in the dtype of `x`. The fused form computes in float32 and rounds once,
        but for the rows that enter a matrix: of 16-bit tokens they are rounded to 16 bit mantissas.
    """
    kernel = choose("experts", x, experts, linears, activation)
    return kernel.run(x, experts, weights, linears, activation, parts)


def from_parts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    linears: tuple[PackedLinear, PackedLinear | None, PackedLinear],
    activation: str,
    parts: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Rows sorted by expert, then matrix by matrix."""
    return parts(x, experts, weights)


def suits_decode(
    x: Tensor,
    experts: Tensor,
    linears: tuple[PackedLinear, PackedLinear | None, PackedLinear],
    activation: str,
) -> bool:
    """Few rows on CUDA with triton, in eager mode and without a gradient."""
    if not x.is_cuda or torch.compiler.is_compiling() or not has_triton():
        return False
    return is_fused(x, experts, linears, activation)


def is_fused(
    x: Tensor,
    experts: Tensor,
    linears: tuple[PackedLinear, PackedLinear | None, PackedLinear],
    activation: str,
) -> bool:
    """Whether the fused kernels can do these numbers, on whatever device."""
    if not 0 < experts.numel() <= MAX_ROWS or activation not in FUSED_ACTIVATIONS:
        return False
    given = [linear for linear in linears if linear is not None]
    tensors = [x, *(t for linear in given for t in linear if isinstance(t, Tensor))]
    if any(t.device != x.device or t.dtype == torch.float64 for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(
        width <= MAX_WIDTH and is_cut(width, angles.shape[1])
        for linear in given
        for width, angles in ((linear.d_in, linear.angles_in), (linear.d_out, linear.angles_out))
    )


def experts_cuda(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    linears: tuple[PackedLinear, PackedLinear | None, PackedLinear],
    activation: str,
    parts: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """All parts in a few launches: see `decode_plan`."""
    numbers: list[list[Tensor | None]] = []
    sizes: list[int] = []
    for linear in linears:
        if linear is None:
            numbers.append([])
            continue
        words = words_of(linear.packed, linear.d_out, linear.d_in, linear.bits)
        numbers.append([words, linear.alpha, *linear[5:]])
        sizes += [linear.d_in, linear.d_out]
    return fused(x, experts, weights, *numbers, sizes, activation)


def words_of(packed: Tensor, d_out: int, d_in: int, bits: str) -> Tensor:
    """The trits as `triton_ternary` reads them, (d_out, words) int32.

    Those of the 2-bit format in rows of whole words are read as they are; else a second copy is
    made once and kept beside the packed tensor.
    """
    if bits == "2" and d_in % 16 == 0 and packed.data_ptr() % 16 == 0:
        return packed.view(torch.int32).view(d_out, d_in // 16)
    version = 0 if packed.is_inference() else packed._version
    found = _words.get(packed)
    if found is None or found[0] != version:
        with torch.inference_mode(False):
            trits = unpack_trits(packed, (d_out, d_in), bits)
            row = 16 * words_a_row(d_in)
            trits = torch.nn.functional.pad(trits, (0, row - d_in))  # (d_out, row)
            words = pack_trits(trits, "2").view(torch.int32).view(d_out, row // 16)
        found = (version, words)
        _words[packed] = found
    return found[1]


torch.library.define(
    "bfmoe::packed_experts_cuda",
    "(Tensor x, Tensor experts, Tensor weights, Tensor?[] up, Tensor?[] gate, Tensor?[] down,"
    " int[] sizes, str activation) -> Tensor",
)
fused = torch.ops.bfmoe.packed_experts_cuda.default


def _sizes(numbers: list[Tensor | None], d_in: int, d_out: int) -> Sizes:
    _, alpha, angles_in, angles_out, gain_in, gain_out, bias = numbers
    assert alpha is not None and angles_in is not None and angles_out is not None
    return Sizes(
        d_in, d_out, angles_in.shape[1], angles_out.shape[1], gain_in is not None,
        gain_out is not None, bias is not None, alpha.numel() > 1,
    )  # fmt: skip


class _Run:
    """One call: the numbers that every launch may want."""

    def __init__(self, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        self.x, self.experts, self.weights = x, experts, weights
        self.rows = experts.numel()

    def go(
        self, passes: list[Pass], x: Tensor, out: list[Tensor | None], into: list[Tensor | None],
        gate: Tensor | None = None, y: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The passes one after the other; `out` and `into` are the matrices before and behind.

        The last one writes to `y`, if there is one.
        """
        for one in passes:
            target = one.result(x, self.rows) if y is None or one is not passes[-1] else y
            tensors = [
                x, target, self.experts, self.weights, gate,
                *(one.tables(x.device) or (None, None)),
                out[3], out[5], out[6], into[2], into[4],
            ]  # fmt: skip
            programs = self.experts.shape[0] if one.constants["COMBINE"] else self.rows
            self.launch(one.call, (programs, one.blocks, 1), tensors)
            x = target
        return x

    def times(self, product: Product, x: Tensor, numbers: list[Tensor | None]) -> Tensor:
        """The product with a matrix, as partial sums."""
        y = x.new_empty(product.splits, self.rows, product.d_out, dtype=torch.float32)
        self.launch(product.call, product.grid(self.rows), [x, *numbers[:2], y])
        return y

    def launch(self, call: Call, grid: tuple[int, int, int], tensors: list[Tensor | None]) -> None:
        """Launch a kernel; an address that it does not read may be any."""
        given = tuple(self.experts if t is None else t for t in tensors)
        call(grid, tuple(t.data_ptr() for t in given), lambda: given, self.rows)


# On the CPU this runs under triton's interpreter only; `suits_decode` never chooses it there.
@torch.library.impl("bfmoe::packed_experts_cuda", ("CUDA", "CPU"))
@on_device
def _fused(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: list[Tensor | None],
    gate: list[Tensor | None],
    down: list[Tensor | None],
    sizes: list[int],
    activation: str,
) -> Tensor:
    matrices = [[None if t is None else t.contiguous() for t in m] for m in (up, gate, down) if m]
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    known = [_sizes(m, *sizes[2 * i : 2 * i + 2]) for i, m in enumerate(matrices)]
    terms = 3 if x.dtype == torch.float32 else 2
    rows = 1 << (experts.numel() - 1).bit_length()  # one plan for all numbers up to this
    dtypes = [t.dtype for m in matrices for t in m if t is not None]
    plan = plan_for(
        known[0], known[1] if gate else None, known[-1], activation, experts.shape[1], rows,
        terms, x.device, x.dtype, weights.dtype, *dtypes,
    )  # fmt: skip
    run, hidden = _Run(x, experts, weights), None
    roles = [matrices[1], matrices[0]] if gate else [matrices[0]]  # the gate comes first
    for numbers, (before, product, behind) in zip(roles, plan.inner, strict=True):
        rotated = run.go(before, x, numbers, numbers)
        sums = run.times(product, rotated, numbers)
        hidden = run.go(behind, sums, numbers, matrices[-1], gate=hidden)
    assert hidden is not None
    product, behind = plan.down
    y = x.new_empty(x.shape[0], known[-1].d_out)
    sums = run.times(product, hidden, matrices[-1])
    return run.go(behind, sums, matrices[-1], matrices[-1], y=y)


@torch.library.register_fake("bfmoe::packed_experts_cuda")
def _(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: list[Tensor | None],
    gate: list[Tensor | None],
    down: list[Tensor | None],
    sizes: list[int],
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], sizes[-1])


register(
    Kernel(
        "experts",
        "parts",
        from_parts,
        lambda *_: True,
        "matrix by matrix, rows sorted by expert; training, many rows, any device",
    )
)
register(
    Kernel(
        "experts",
        "triton",
        experts_cuda,
        suits_decode,
        f"a packed layer for up to {MAX_ROWS} rows; CUDA with triton, no gradient",
        missing=missing_triton,
    )
)
