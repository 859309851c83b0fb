"""The product of a few rows with a packed ternary matrix: the rows of a decoding step.

A word of 32 bits holds 16 trits, the first in its lowest bits, each as the digit t + 1: the bytes
of the 2-bit format, read four at a time. Trit i of all words of a block forms a matrix of its own,
so that nothing moves between threads when words are taken apart; the rows come with their columns
in that order (`place_of`).

A handful of rows is summed in float32 right where the words are (`few_kernel`). More of them go to
the tensor cores (`ternary_kernel`): trits are exact in bfloat16, and a row in float32 comes as the
sum of two or three bfloat16 numbers, so that TERMS products add up what one in float32 would give.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl

ZEROS = tl.constexpr(0x55555555)  # 16 trits 0
# The interpreter computes with bfloat16 numbers as if their bits were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FACTOR = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def place_of(column, BLOCK_IN: tl.constexpr):
    """Where a column lies in a row that is multiplied: trit by trit within each block."""
    inside = column % BLOCK_IN
    return column - inside + (inside % 16) * (BLOCK_IN // 16) + inside // 16


@triton.jit
def _trits(words, NUMBER: tl.constexpr):
    """Trit NUMBER of each word, as bfloat16."""
    digits = words >> (2 * NUMBER)
    if INTERPRETED:
        trits = ((digits & 3) - 1).to(tl.float32)
    else:
        trits = ((digits & 3) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + digit
        trits -= 129.0
    return trits


@triton.jit
def _trits_float32(words, NUMBER: tl.constexpr):
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

    BLOCK_ROWS is 1, 2 or 4. Reads (rows, D_IN up to a whole block) float32 in the order of
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
    b, c, d = a, a, a
    for number in tl.static_range(16):
        trits = _trits_float32(words, number)
        a += trits * _row(p_x, row, rows, first, number, D_IN, LENGTH, BESIDE)
        if BLOCK_ROWS > 1:
            b += trits * _row(p_x, row + 1, rows, first, number, D_IN, LENGTH, BESIDE)
        if BLOCK_ROWS > 2:
            c += trits * _row(p_x, row + 2, rows, first, number, D_IN, LENGTH, BESIDE)
            d += trits * _row(p_x, row + 3, rows, first, number, D_IN, LENGTH, BESIDE)
    alpha = tl.load(p_alpha + (out if BY_ROW else out * 0), mask=out < D_OUT, other=0.0)
    p_y += (split * rows + row) * D_OUT + out
    left = rows - row
    tl.store(p_y, alpha * tl.sum(a, axis=1), mask=out < tl.where(left > 0, D_OUT, 0))
    if BLOCK_ROWS > 1:
        there = out < tl.where(left > 1, D_OUT, 0)
        tl.store(p_y + D_OUT, alpha * tl.sum(b, axis=1), mask=there)
    if BLOCK_ROWS > 2:
        there = out < tl.where(left > 2, D_OUT, 0)
        tl.store(p_y + 2 * D_OUT, alpha * tl.sum(c, axis=1), mask=there)
        there = out < tl.where(left > 3, D_OUT, 0)
        tl.store(p_y + 3 * D_OUT, alpha * tl.sum(d, axis=1), mask=there)


@triton.jit(do_not_specialize=["rows"])
def ternary_kernel(
    p_x, p_words, p_alpha, p_y, rows,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, WORDS: tl.constexpr, BY_ROW: tl.constexpr,
    SPLITS: tl.constexpr, TERMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (block, split): a block of outputs for all rows, summed over a share of the inputs.

    Reads (TERMS, rows, D_IN up to a whole block) bfloat16 in the order of `place_of`, writes
    (SPLITS, rows, D_OUT) partial sums, times alpha, in float32.
    """
    BLOCKS: tl.constexpr = (D_IN + BLOCK_IN - 1) // BLOCK_IN
    CHUNKS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    BESIDE: tl.constexpr = BLOCK_IN // 16
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row, beside = tl.arange(0, BLOCK_ROWS), tl.arange(0, BESIDE)
    sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * BLOCK_IN
        word = first // 16 + beside
        there = (out < D_OUT)[:, None] & (word < WORDS)[None, :]
        at = out[:, None] * WORDS + word[None, :]
        words = tl.load(p_words + at, mask=there, other=ZEROS)
        part = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for number in tl.static_range(16):
            trits = _trits(words, number)
            there = (row < rows)[None, :] & (first + 16 * beside + number < D_IN)[:, None]
            at = row[None, :] * (BLOCKS * BLOCK_IN) + first + number * BESIDE + beside[:, None]
            for term in tl.static_range(TERMS - 1, -1, -1):  # the small ones first
                p_term = p_x + term * rows * (BLOCKS * BLOCK_IN)
                x = tl.load(p_term + at, mask=there, other=0.0)
                part = tl.dot(trits, x.to(FACTOR), part)
        sums += part  # apart, for tensor cores cut off what they cannot hold
    if BY_ROW:
        sums *= tl.load(p_alpha + out, mask=out < D_OUT, other=0.0)[:, None]
    else:
        sums *= tl.load(p_alpha)
    at = (split * rows + row)[None, :] * D_OUT + out[:, None]
    tl.store(p_y + at, sums, mask=(row < rows)[None, :] & (out < D_OUT)[:, None])
