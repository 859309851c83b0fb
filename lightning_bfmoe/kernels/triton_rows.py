"""Kernels that carry tokens to their experts' rows and back: dispatch, combine, their gradients.

Row `back[t k + j]` of the sorted rows belongs to slot j of token t. Each program takes a few tokens
and all their slots, so a token's numbers are read once, nothing is added atomically, and a repeat
gives the same bits. Sums are float32 and rounded once.

Imported only where triton is installed (`kernels.rows_cuda` does).
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl


@triton.jit
def _add_slot(
    total, p_rows, p_weights, p_back, token, column, inside, mask, j,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row = tl.load(p_back + token * K + j, mask=inside, other=0)
    x = tl.load(p_rows + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(p_weights + token * K + j, mask=inside, other=0.0).to(tl.float32)
        x = x * weight[:, None]
    return total + x


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    p_rows, p_weights, p_back, p_y, tokens,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Combine: y[t] = sum_j w[t, j] rows[back[t k + j]]; without weights dispatch's gradient."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    mask = inside[:, None] & (column < D)[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    if K <= 8:  # unrolled: the loads of all slots are under way together
        for j in tl.static_range(K):
            total = _add_slot(
                total, p_rows, p_weights, p_back, token, column, inside, mask, j, D, K, WEIGHTED
            )
    else:
        for j in range(K):
            total = _add_slot(
                total, p_rows, p_weights, p_back, token, column, inside, mask, j, D, K, WEIGHTED
            )
    y = total.to(p_y.dtype.element_ty)
    tl.store(p_y + token[:, None] * D + column[None, :], y, mask=mask)


@triton.jit
def _numbers_of(p_x, token, column, inside, D: tl.constexpr):
    mask = inside[:, None] & (column < D)[None, :]
    return tl.load(p_x + token[:, None] * D + column[None, :], mask=mask, other=0.0), mask


@triton.jit
def _spread_slot(
    x, p_x, p_rows, p_weights, p_back, p_spread, p_dot, token, inside, j,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row = tl.load(p_back + token * K + j, mask=inside, other=0)
    if WEIGHTED:
        weight = tl.load(p_weights + token * K + j, mask=inside, other=0.0).to(tl.float32)
        dot = tl.zeros([TOKENS], tl.float32)
    for piece in tl.static_range(PIECES):
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < D)[None, :]
        if PIECES > 1:
            x, _ = _numbers_of(p_x, token, column, inside, D)
        at = row[:, None] * D + column[None, :]
        value = x
        if WEIGHTED:
            wide = x.to(tl.float32)
            dot += tl.sum(tl.load(p_rows + at, mask=mask, other=0.0).to(tl.float32) * wide, axis=1)
            value = wide * weight[:, None]
        tl.store(p_spread + at, value.to(p_spread.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(p_dot + token * K + j, dot.to(p_dot.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def spread_kernel(
    p_x, p_rows, p_weights, p_back, p_spread, p_dot, tokens,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Dispatch: spread[back[t k + j]] = x[t].

    With weights combine's gradient: w[t, j] x[t], and for w[t, j] the dot product of x[t] and
    rows[back[t k + j]].
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    x, _ = _numbers_of(p_x, token, tl.arange(0, COLUMNS), inside, D)
    if K <= 8:
        for j in tl.static_range(K):
            _spread_slot(
                x, p_x, p_rows, p_weights, p_back, p_spread, p_dot, token, inside, j,
                D, K, TOKENS, COLUMNS, PIECES, WEIGHTED,
            )  # fmt: skip
    else:
        for j in range(K):
            _spread_slot(
                x, p_x, p_rows, p_weights, p_back, p_spread, p_dot, token, inside, j,
                D, K, TOKENS, COLUMNS, PIECES, WEIGHTED,
            )  # fmt: skip
