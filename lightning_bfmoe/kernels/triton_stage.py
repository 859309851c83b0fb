"""One stage of the fused rotation on a tile that lies in registers; see `triton_rotation`.

A tile is [ROWS, BESIDE, D]: a thread holds all ROWS, so that sums over them and the coefficients
they share cost no exchange. BESIDE rows lie in other threads where a row is too short to fill them.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
from lightning_bfmoe.kernels.triton_layout import (
    columns,
    columns_like,
    constexpr,
    gl,
    jit,
    tile_rows,
)


@jit
def offsets(
    rows, WIDTH: constexpr, ROWS: constexpr, BESIDE: constexpr, D: constexpr,
    LAYOUT: constexpr,
):  # fmt: skip
    """Offsets of a tile from its first number, and which of them are there: `rows` rows are."""
    row, column = tile_rows(ROWS, BESIDE, LAYOUT), columns(D, LAYOUT)
    there = row < rows
    if D != WIDTH:
        there = there & (column < WIDTH)
    return row * WIDTH + column, there


@jit
def pairs(x, ROWS: constexpr, BESIDE: constexpr, D: constexpr, STRIDE: constexpr):
    """[.., D] -> both members of the pairs (j, j + STRIDE), each [.., D / 2] in pair order."""
    x = gl.reshape(x, (ROWS, BESIDE, D // (2 * STRIDE), 2, STRIDE))
    first, second = gl.split(gl.permute(x, (0, 1, 2, 4, 3)))
    first = gl.reshape(first, (ROWS, BESIDE, D // 2))
    return first, gl.reshape(second, (ROWS, BESIDE, D // 2))


@jit
def merge(
    first, second,
    ROWS: constexpr, BESIDE: constexpr, D: constexpr, STRIDE: constexpr,
):  # fmt: skip
    """The inverse of `pairs`."""
    first = gl.reshape(first, (ROWS, BESIDE, D // (2 * STRIDE), STRIDE))
    second = gl.reshape(second, (ROWS, BESIDE, D // (2 * STRIDE), STRIDE))
    x = gl.permute(gl.join(first, second), (0, 1, 2, 4, 3))
    return gl.reshape(x, (ROWS, BESIDE, D))


@jit
def coefficients(p_stage, x1, D: constexpr, DERIVE: constexpr):
    """(a, b) of a regular stage, each [1, 1, D / 2]; DERIVE computes b = sin from a = tan(half)."""
    pair = columns_like(x1, D // 2)
    a = gl.load(p_stage + pair)
    b = 2.0 * a / (1.0 + a * a) if DERIVE else gl.load(p_stage + D // 2 + pair)
    return a, b


@jit
def turn(x1, x2, a, b, LIFT: constexpr):
    """Rotate pairs, by three shears or by the definition."""
    if LIFT:
        x1 = x1 - a * x2
        x2 = x2 + b * x1
        x1 = x1 - a * x2
    else:
        x1, x2 = a * x1 - b * x2, b * x1 + a * x2
    return x1, x2


@jit
def signed(x, p_signs, D: constexpr):
    """The sign that the shears left on each column."""
    return x * gl.load(p_signs + columns_like(x, D))


@jit
def partners(x, p_partner, D: constexpr):
    """Each column's partner in an irregular stage, for every row."""
    partner = gl.load(p_partner + columns_like(x, D))
    return gl.where(x == x, partner, partner)  # spread over the rows, in the shape of x


@jit
def blend(x, other, p_stage, D: constexpr):
    """An irregular stage, column by column: cos x -+ sin partner."""
    column = columns_like(x, D)
    return gl.load(p_stage + column) * x + gl.load(p_stage + D + column) * other


@jit
def first_row(x, ROWS: constexpr, BESIDE: constexpr, N: constexpr):
    """[ROWS, BESIDE, N] -> [BESIDE, N], the first of the ROWS."""
    if ROWS == 1:
        x = gl.reshape(x, (BESIDE, N))
    else:
        x, _ = gl.split(gl.permute(gl.reshape(x, (2, ROWS // 2, BESIDE, N)), (1, 2, 3, 0)))
        x = first_row(x, ROWS // 2, BESIDE, N)
    return x


@jit
def add_rows(
    sums, x, y,
    MINUS: constexpr, ROWS: constexpr, BESIDE: constexpr, N: constexpr,
):  # fmt: skip
    """Sums [BESIDE, N] +- sum over the ROWS of x y, one chain of multiply-adds in each thread."""
    if ROWS == 1:
        x, y = gl.reshape(x, (BESIDE, N)), gl.reshape(y, (BESIDE, N))
        sums = sums - x * y if MINUS else sums + x * y
    else:
        x1, x2 = gl.split(gl.permute(gl.reshape(x, (2, ROWS // 2, BESIDE, N)), (1, 2, 3, 0)))
        y1, y2 = gl.split(gl.permute(gl.reshape(y, (2, ROWS // 2, BESIDE, N)), (1, 2, 3, 0)))
        sums = add_rows(sums, x1, y1, MINUS, ROWS // 2, BESIDE, N)
        sums = add_rows(sums, x2, y2, MINUS, ROWS // 2, BESIDE, N)
    return sums
