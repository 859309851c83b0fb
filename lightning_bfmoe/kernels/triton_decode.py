"""Rotations of a few rows in a few launches: decoding, where a row's angles are met only once.

The fused rotation (`triton_rotation`) first tabulates the coefficients of every expert, which pays
when many rows share them. A decoded token meets its own experts' angles alone, so here each program
takes cosines and sines itself, and a row is cut into tiles so that many multiprocessors share it:
the lower regular stages pair columns within a block, the upper ones pair whole blocks, column by
column. What lies between two rotations (gain, bias, activation, gate, the routing weights) is done
on the tile that is at hand.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl

from lightning_bfmoe.kernels.triton_ternary import place_of

constexpr = tl.constexpr


@triton.jit
def _cos_sin(theta):
    """Cosine and sine, to about one rounding for |theta| up to 10^4.

    The compiler's own are exact for any argument, and so long that a kernel of thirteen stages
    becomes half a megabyte. Source: range reduction and polynomials of Cephes (sinf.c, cosf.c).
    """
    turns = theta * 0.6366197723675814 + 12582912.0  # 1.5 * 2^23: the sum ends in the units
    quarter = turns.to(tl.int32, bitcast=True)
    turns -= 12582912.0
    theta = ((theta - turns * 1.5703125) - turns * 4.83751296997e-4) - turns * 7.54978995489e-8
    square = theta * theta
    sin = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sin = sin * square * theta + theta
    cos = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = cos * square * square - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter + 1) & 2 != 0, -cos, cos), tl.where(quarter & 2 != 0, -sin, sin)


@triton.jit
def _column(t, block, UPPER: constexpr, LOWER_BITS: constexpr, BITS: constexpr, T: constexpr):
    """The column of the row at place t of a tile: blocks of 2^LOWER_BITS, or a slice across them.

    An upper tile is [2^BITS / 2^LOWER_BITS blocks, some neighbouring columns].
    """
    if UPPER:
        BESIDE: constexpr = T >> (BITS - LOWER_BITS)
        SLICES: constexpr = 2**LOWER_BITS // BESIDE
        column = (t // BESIDE) * 2**LOWER_BITS + t % BESIDE
        column += (block // SLICES) * 2**BITS + (block % SLICES) * BESIDE
    else:
        column = block * T + t
    return column


@triton.jit
def _stage(
    x, p_angles, block,
    S: constexpr, PAIRS: constexpr, UPPER: constexpr, LOWER_BITS: constexpr, BITS: constexpr,
    T: constexpr, TRANSPOSE: constexpr,
):  # fmt: skip
    """Regular stage S on a tile [T]; p_angles are those of the row's expert."""
    STRIDE: constexpr = (2**S // 2**LOWER_BITS) * (T >> (BITS - LOWER_BITS)) if UPPER else 2**S
    x = tl.permute(tl.reshape(x, (T // (2 * STRIDE), 2, STRIDE)), (0, 2, 1))
    first, second = tl.split(x)
    n = tl.arange(0, T // 2)
    column = _column((n // STRIDE) * (2 * STRIDE) + n % STRIDE, block, UPPER, LOWER_BITS, BITS, T)
    pair = ((column >> (S + 1)) << S) | (column & (2**S - 1))
    theta = tl.load(p_angles + S * PAIRS + pair).to(tl.float32)
    theta = tl.reshape(theta, (T // (2 * STRIDE), STRIDE))
    cos, sin = _cos_sin(theta)
    if TRANSPOSE:
        sin = -sin
    x = tl.join(cos * first - sin * second, sin * first + cos * second)
    return tl.reshape(tl.permute(x, (0, 2, 1)), (T,))


@triton.jit
def _source(
    p_x, p_gain, p_angles, p_partner, p_pair, column, at, split, inside,
    LEVEL: constexpr, IRREGULAR: constexpr, REGULAR: constexpr, WIDTH: constexpr,
    SIZE: constexpr, SPLITS: constexpr, GAIN: constexpr, TRANSPOSE: constexpr,
):  # fmt: skip
    """The numbers of a row at some columns after LEVEL of its irregular stages.

    Such a stage mixes a column with a partner anywhere in the row; few stages are few gathers.
    """
    if LEVEL == 0:
        x = tl.load(p_x + at + column, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(1, SPLITS):
            x += tl.load(p_x + at + i * split + column, mask=inside, other=0.0)
        if GAIN:
            x *= tl.load(p_gain + column, mask=inside, other=0.0).to(tl.float32)
    else:
        NUMBER: constexpr = IRREGULAR - LEVEL if TRANSPOSE else LEVEL - 1
        partner = tl.load(p_partner + NUMBER * SIZE + column, mask=inside, other=0)
        own = tl.load(p_pair + NUMBER * SIZE + column, mask=inside, other=-1)
        both = tl.maximum(own, tl.load(p_pair + NUMBER * SIZE + partner, mask=inside, other=-1))
        p_theta = p_angles + (REGULAR + NUMBER) * (WIDTH // 2) + both
        theta = tl.load(p_theta, mask=inside & (both >= 0), other=0.0).to(tl.float32)
        cos, sin = _cos_sin(theta)
        if TRANSPOSE:
            sin = -sin
        x = _source(
            p_x, p_gain, p_angles, p_partner, p_pair, column, at, split, inside,
            LEVEL - 1, IRREGULAR, REGULAR, WIDTH, SIZE, SPLITS, GAIN, TRANSPOSE,
        )  # fmt: skip
        other = _source(
            p_x, p_gain, p_angles, p_partner, p_pair, partner, at, split, inside,
            LEVEL - 1, IRREGULAR, REGULAR, WIDTH, SIZE, SPLITS, GAIN, TRANSPOSE,
        )  # fmt: skip
        x = cos * x + tl.where(own >= 0, -sin, sin) * other
    return x


@triton.jit
def _activate(x, NAME: constexpr):
    """An activation of `layers.activation` by name."""
    if NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif NAME == "relu2":
        x = tl.where(x < 0.0, 0.0, x * x)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


@triton.jit(do_not_specialize=["rows"])
def pass_kernel(
    p_x, p_y, p_experts, p_weights, p_gate, p_partner, p_pair,
    p_out, p_out_gain, p_bias, p_in, p_in_gain, rows,
    WIDTH: constexpr, SIZE: constexpr, REGULAR: constexpr, T: constexpr, UPPER: constexpr,
    LOWER_BITS: constexpr, SLOTS: constexpr, TOKENS: constexpr, SPLITS: constexpr,
    OUT_FIRST: constexpr, OUT_STOP: constexpr, OUT_STAGES: constexpr, OUT_IRREGULAR: constexpr,
    IN_FIRST: constexpr, IN_STOP: constexpr, IN_STAGES: constexpr, IN_IRREGULAR: constexpr,
    OUT_GAIN: constexpr, BIAS: constexpr, ACTIVATION: constexpr, GATE: constexpr,
    IN_GAIN: constexpr, COMBINE: constexpr, BLOCK_IN: constexpr,
):  # fmt: skip
    """Program (row or token, block): what is due on one tile.

    In this order: read (SPLITS partial sums; of the row's token with TOKENS), irregular stages,
    stages OUT_FIRST..OUT_STOP of B(phi), gain, bias, activation, times the gate; gain, stages
    IN_STOP..IN_FIRST of B(theta)^T; write. With COMBINE a program does all SLOTS rows of its token
    and writes their weighted sum. With BLOCK_IN it writes in the order of
    `triton_ternary.place_of`.
    """
    PAIRS: constexpr = WIDTH // 2
    place, block = tl.program_id(0), tl.program_id(1)
    column = _column(tl.arange(0, T), block, UPPER, LOWER_BITS, REGULAR, T)
    inside = column < WIDTH
    total = tl.zeros((T,), tl.float32)
    for slot in tl.static_range(SLOTS if COMBINE else 1):
        row = place * SLOTS + slot if COMBINE else place
        expert = tl.load(p_experts + row).to(tl.int64)
        p_phi = p_out + expert * (OUT_STAGES * PAIRS)
        p_theta = p_in + expert * (IN_STAGES * PAIRS)
        at = (row // SLOTS if TOKENS else row) * WIDTH
        if IN_IRREGULAR > 0:  # the first that is done to a row; gains come before
            x = _source(
                p_x, p_in_gain + expert * WIDTH, p_theta, p_partner, p_pair, column, at,
                rows * WIDTH, inside, IN_IRREGULAR, IN_IRREGULAR, REGULAR, WIDTH, SIZE, SPLITS,
                IN_GAIN, True,
            )  # fmt: skip
        else:
            x = _source(
                p_x, p_in_gain, p_phi, p_partner, p_pair, column, at, rows * WIDTH, inside,
                OUT_IRREGULAR, OUT_IRREGULAR, REGULAR, WIDTH, SIZE, SPLITS, False, False,
            )  # fmt: skip
            for s in tl.static_range(OUT_FIRST, OUT_STOP):
                x = _stage(x, p_phi, block, s, PAIRS, UPPER, LOWER_BITS, REGULAR, T, False)
            if OUT_GAIN:
                p_gain = p_out_gain + expert * WIDTH + column
                x *= tl.load(p_gain, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                x += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)
            x = _activate(x, ACTIVATION)
            if GATE:
                x *= tl.load(p_gate + row * WIDTH + column, mask=inside, other=0.0)
            if IN_GAIN:
                p_gain = p_in_gain + expert * WIDTH + column
                x *= tl.load(p_gain, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(IN_STOP - IN_FIRST):
            x = _stage(
                x, p_theta, block, IN_STOP - 1 - i, PAIRS, UPPER, LOWER_BITS, REGULAR, T, True
            )
        if COMBINE:
            total += tl.load(p_weights + row).to(tl.float32) * x
        else:
            total = x
    if BLOCK_IN == 0:
        at = place * WIDTH + column
    else:
        LENGTH: constexpr = (WIDTH + BLOCK_IN - 1) // BLOCK_IN * BLOCK_IN
        at = place * LENGTH + place_of(column, BLOCK_IN)
    tl.store(p_y + at, total.to(p_y.dtype.element_ty), mask=inside)
