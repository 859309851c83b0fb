"""The product of a few rows with a packed ternary matrix: the rows of a decoding step.

A word of 32 bits holds 16 trits, the first in its lowest bits, each as the digit t + 1: the bytes
of the 2-bit format, read four at a time.

One row or two are summed in float32 right where the words are (`few_kernel`): trit i of all words
of a block is a matrix of its own, so that nothing moves between threads, and the rows come with
their columns in that order (`place_of`). More rows go to the tensor cores (`ternary_kernel`): trits
are exact in bfloat16, and a number in float32 is the sum of two or three in bfloat16, so that TERMS
products add up what one in float32 would give.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl

ZEROS = tl.constexpr(0x55555555)  # 16 trits 0
# The interpreter multiplies bfloat16 matrices as if their bits were integers.
FACTOR = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def place_of(column, BLOCK_IN: tl.constexpr):
    """Where a column lies in a row that is multiplied: trit by trit within each block."""
    inside = column % BLOCK_IN
    return column - inside + (inside % 16) * (BLOCK_IN // 16) + inside // 16


@triton.jit
def _trits(words, NUMBER: tl.constexpr):
    """Trit NUMBER of each word, as float32."""
    digits = ((words >> (2 * NUMBER)) & 3) | 0x4B000000  # 2^23 + digit
    return digits.to(tl.float32, bitcast=True) - 8388609.0


@triton.jit
def _row(p_x, row, rows, first, number, D_IN: tl.constexpr, LENGTH: tl.constexpr,
         BESIDE: tl.constexpr):  # fmt: skip
    """What trit `number` of each word of a block is multiplied with."""
    beside = tl.arange(0, BESIDE)
    there = first + 16 * beside + number < tl.where(row < rows, D_IN, 0)
    at = row * LENGTH + first + number * BESIDE + beside
    return tl.load(p_x + at, mask=there, other=0.0)[None, :]


@triton.jit(do_not_specialize=["rows"])
def few_kernel(
    p_x, p_words, p_alpha, p_y, rows,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, WORDS: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (block, split, some rows): a block of outputs, summed over a block of inputs.

    BLOCK_ROWS is 1 or 2. Reads (rows, D_IN up to a whole block) float32 in the order of
    `place_of`, writes (splits, rows, D_OUT) partial sums, times alpha, in float32.
    """
    BESIDE: tl.constexpr = BLOCK_IN // 16
    LENGTH: tl.constexpr = (D_IN + BLOCK_IN - 1) // BLOCK_IN * BLOCK_IN
    split, row = tl.program_id(1), tl.program_id(2) * BLOCK_ROWS
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = split * BLOCK_IN
    word = first // 16 + tl.arange(0, BESIDE)
    there = (out < D_OUT)[:, None] & (word < WORDS)[None, :]
    words = tl.load(p_words + out[:, None] * WORDS + word[None, :], mask=there, other=ZEROS)
    a = tl.zeros((BLOCK_OUT, BESIDE), tl.float32)
    b = a
    for number in tl.static_range(16):
        trits = _trits(words, number)
        a += trits * _row(p_x, row, rows, first, number, D_IN, LENGTH, BESIDE)
        if BLOCK_ROWS > 1:
            b += trits * _row(p_x, row + 1, rows, first, number, D_IN, LENGTH, BESIDE)
    alpha = tl.load(p_alpha + (out if BY_ROW else out * 0), mask=out < D_OUT, other=0.0)
    p_y += (split * rows + row) * D_OUT + out
    left = rows - row
    tl.store(p_y, alpha * tl.sum(a, axis=1), mask=out < tl.where(left > 0, D_OUT, 0))
    if BLOCK_ROWS > 1:
        there = out < tl.where(left > 1, D_OUT, 0)
        tl.store(p_y + D_OUT, alpha * tl.sum(b, axis=1), mask=there)


@triton.jit
def _matrix(words, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Words (BLOCK_OUT, BLOCK_IN / 16) to trits (BLOCK_OUT, BLOCK_IN)."""
    digits = (words[:, :, None] >> (2 * tl.arange(0, 16))[None, None, :]) & 3
    trits = tl.where(digits == 2, 1.0, tl.where(digits == 0, -1.0, 0.0)).to(FACTOR)
    return tl.reshape(trits, (BLOCK_OUT, BLOCK_IN))


@triton.jit
def _product(trits, x, TERMS: tl.constexpr):
    """Trits times x (float32), x as a sum of TERMS bfloat16 numbers; the small ones first."""
    term = x.to(tl.bfloat16)
    if TERMS == 1:
        sums = tl.dot(trits, term.to(FACTOR))
    else:
        sums = _product(trits, x - term.to(tl.float32), TERMS - 1)
        sums = tl.dot(trits, term.to(FACTOR), sums)
    return sums


@triton.jit(do_not_specialize=["rows"])
def ternary_kernel(
    p_x, p_words, p_alpha, p_y, rows,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, WORDS: tl.constexpr, BY_ROW: tl.constexpr,
    SPLITS: tl.constexpr, TERMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (block, split): a block of outputs for all rows, summed over a share of the inputs.

    Reads (rows, D_IN) float32, writes (SPLITS, rows, D_OUT) partial sums, times alpha, in float32.
    """
    CHUNKS: tl.constexpr = (D_IN + SPLITS * BLOCK_IN - 1) // (SPLITS * BLOCK_IN)
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * BLOCK_IN
        word = first // 16 + tl.arange(0, BLOCK_IN // 16)
        there = (out < D_OUT)[:, None] & (word < WORDS)[None, :]
        at = out[:, None] * WORDS + word[None, :]
        trits = _matrix(tl.load(p_words + at, mask=there, other=ZEROS), BLOCK_OUT, BLOCK_IN)
        column = first + tl.arange(0, BLOCK_IN)
        there = (row < rows)[None, :] & (column < D_IN)[:, None]
        x = tl.load(p_x + row[None, :] * D_IN + column[:, None], mask=there, other=0.0)
        sums += _product(trits, x, TERMS)  # apart, for tensor cores cut off what they cannot hold
    if BY_ROW:
        sums *= tl.load(p_alpha + out, mask=out < D_OUT, other=0.0)[:, None]
    else:
        sums *= tl.load(p_alpha)
    at = (split * rows + row)[None, :] * D_OUT + out[:, None]
    tl.store(p_y + at, sums, mask=(row < rows)[None, :] & (out < D_OUT)[:, None])
