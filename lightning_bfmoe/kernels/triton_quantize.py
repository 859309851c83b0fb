"""Kernels that blend a latent matrix towards its ternary form: read once, written once.

All arithmetic is float32 and in the definition's order, without fused multiply-adds (a launch
option), so that results differ from it by the order of a row's sum alone. With a ternary w / alpha
= 1/2 exactly, rounding half to even gives 0; otherwise |w| > alpha / 2 decides, which is the same
as rounding the float32 quotient.

Imported only where triton is installed (`kernels.quantize_cuda` does).
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl


@triton.jit
def blended(w, keep, alpha, p_blend):
    """The blend w + lambda (alpha T - w), exactly alpha T at lambda 1; T is not 0 where `keep`."""
    blend = tl.load(p_blend).to(tl.float32)
    target = alpha * tl.where(keep, tl.where(w < 0, -1.0, 1.0), 0.0)
    return tl.where(blend >= 1, target, w + blend * (target - w))


@triton.jit
def _floored(mean, EPS: tl.constexpr):
    """At least EPS; NaN stays NaN."""
    return tl.where(mean < EPS, EPS, mean)


@triton.jit(do_not_specialize=["rows"])
def absmean_rows_kernel(
    p_weight, p_blend, p_out, rows,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Scale mean|w| of each row; a program takes ROWS of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside & (column < D)[None, :]
        w = tl.load(p_weight + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.abs(w), axis=1)
    alpha = _floored(tl.div_rn(total, 1.0 * D), EPS)[:, None]
    for piece in tl.static_range(PIECES):
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        if PIECES > 1:
            w = tl.load(p_weight + at, mask=mask, other=0.0)
        out = blended(w, tl.abs(w) > 0.5 * alpha, alpha, p_blend)
        tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(p_weight, p_parts, NUMBERS: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """parts[i] = sum of |w| over the i-th share of all numbers."""
    first = tl.program_id(0).to(tl.int64) * SHARE
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SHARE, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(p_weight + at, mask=at < NUMBERS, other=0.0))
    tl.store(p_parts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["parts"])
def absmean_tensor_kernel(
    p_weight, p_parts, p_blend, p_out, parts,
    NUMBERS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One scale for all numbers, from the sums of their shares."""
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(p_parts + part, mask=part < parts, other=0.0), axis=0)
    alpha = _floored(tl.div_rn(total, 1.0 * NUMBERS), EPS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(p_weight + at, mask=at < NUMBERS, other=0.0)
    out = blended(w, tl.abs(w) > 0.5 * alpha, alpha, p_blend)
    tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=at < NUMBERS)
