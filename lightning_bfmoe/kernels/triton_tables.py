"""Kernels around the fused rotation: its coefficients and row plan before, its gradients after.

The table of an expert holds, one after the other,

- for each regular stage a, then b of every pair (tan(theta / 2) and sin(theta) of the three
  shears, or cos and sin of the definition), padded to 2^LOG_D / 2 pairs; a alone with DERIVE,
- the sign of each column after the last regular stage,
- for each irregular stage a factor of the column itself and one of its partner.

Shears need |theta| <= pi / 2, so a half turn is taken off where cos(theta) < 0 and its sign -1 is
left on both columns. Later stages see columns with signs s1 and s2 and turn by s1 s2 theta.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
from lightning_bfmoe.kernels.triton_layout import (
    constexpr,
    gl,
    grid_columns,
    grid_rows,
    jit,
    line,
    numbers,
    numbers_like,
    signs_at,
    table_size,
)

INVERSE_PI = constexpr(0.3183098861837907)
ROUNDING = constexpr(12582912.0)  # 1.5 * 2^23: a sum with it ends in the units


@jit
def _half_turns(theta):
    """Odd if theta is nearest to an odd number of half turns, for |theta| up to 10^7."""
    return (theta * INVERSE_PI + ROUNDING).to(gl.int32, bitcast=True)


@jit
def _sign(flips):
    return 1.0 - 2.0 * (flips & 1).to(gl.float32)


@jit
def _pair_sign(
    p_angles, stage, pair, mask,
    PAIRS: constexpr, REGULAR: constexpr, DOWN: constexpr,
):  # fmt: skip
    """The product of the signs that earlier stages of the walk left on both columns of a pair."""
    low = (1 << stage) - 1
    column = ((pair & ~low) << 1) | (pair & low)
    apart = (low + 1) >> (0 if DOWN else 1)  # of the pairs that hold the two in another stage
    flips = pair * 0
    for other in gl.static_range(REGULAR):  # unrolled, so that all loads are under way together
        p_theta = p_angles + other * PAIRS
        p_theta += ((column >> (other + 1)) << other) | (column & ((1 << other) - 1))
        earlier = mask & ((stage < other) if DOWN else (stage > other))
        flips ^= _half_turns(gl.load(p_theta, mask=earlier, other=0.0))
        flips ^= _half_turns(gl.load(p_theta + apart, mask=earlier, other=0.0))
    return _sign(flips)


@jit
def _column_sign(p_angles, column, mask, PAIRS: constexpr, REGULAR: constexpr):
    """The product of the signs that all regular stages left on a column."""
    flips = column * 0
    for stage in gl.static_range(REGULAR):
        pair = ((column >> (stage + 1)) << stage) | (column & ((1 << stage) - 1))
        theta = gl.load(p_angles + stage * PAIRS + pair, mask=mask, other=0.0)
        flips ^= _half_turns(theta)
    return _sign(flips)


@jit
def _count_before(p_counts, expert, experts, height, WARPS: constexpr):
    """Rows and tiles of the experts before this one."""
    rows, tiles = 0, 0
    for start in range(0, experts, 256):
        index = start + numbers(256, line(WARPS))
        count = gl.load(p_counts + index, mask=index < expert, other=0).to(gl.int32)
        rows += gl.sum(count, axis=0)
        tiles += gl.sum((count + height - 1) // height, axis=0)
    return rows, tiles


@jit(do_not_specialize=["experts", "height"])
def prepare_kernel(
    p_angles, p_counts, p_partner, p_pair, p_table, p_plan, experts, height,
    WIDTH: constexpr, LOG_D: constexpr, REGULAR: constexpr, IRREGULAR: constexpr,
    DOWN: constexpr, LIFT: constexpr, DERIVE: constexpr, BLOCK: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Program (expert, block): a block of the expert's table; the first block also plans its rows.

    The table of an expert without rows is left as it is: nothing reads it, and decoding a few
    tokens would else pay for all experts.

    Plan: first row of each expert, the number of rows, then the last tile (exclusive) of each.
    """
    PAIRS: constexpr = WIDTH // 2
    D: constexpr = 2**LOG_D
    expert, block = gl.program_id(0), gl.program_id(1)
    p_angles += expert.to(gl.int64) * ((REGULAR + IRREGULAR) * PAIRS)
    p_table += expert.to(gl.int64) * table_size(LOG_D, REGULAR, IRREGULAR, DERIVE)
    count = gl.load(p_counts + expert).to(gl.int32)
    if block == 0:
        rows, tiles = _count_before(p_counts, expert, experts, height, WARPS)
        gl.store(p_plan + expert, rows)
        gl.store(p_plan + experts + 1 + expert, tiles + (count + height - 1) // height)
        if expert == experts - 1:
            gl.store(p_plan + experts, rows + count)
    block = gl.where(count > 0, block, 1 << 20)  # past every mask below
    item = block * BLOCK + numbers(BLOCK, line(WARPS))
    direction: constexpr = -1.0 if DOWN else 1.0
    if block * BLOCK < REGULAR * (D // 2):
        stage, pair = item // (D // 2), item % (D // 2)
        inside = (item < REGULAR * (D // 2)) & (pair < PAIRS)
        theta = gl.load(p_angles + stage * PAIRS + pair, mask=inside, other=0.0)
        cos, sin = gl.cos(theta), direction * gl.sin(theta)
        o, mask = stage * (D // 2 if DERIVE else D) + pair, item < REGULAR * (D // 2)
        if LIFT:
            sign = _sign(_half_turns(theta))
            cos, sin = cos * sign, sin * sign
            sin *= _pair_sign(p_angles, stage, pair, inside, PAIRS, REGULAR, DOWN)
            gl.store(p_table + o, sin / gl.maximum(1.0 + cos, 1e-6), mask=mask)
        else:
            gl.store(p_table + o, cos, mask=mask)
        if not DERIVE:
            gl.store(p_table + o + D // 2, sin, mask=mask)
    item -= gl.cdiv(REGULAR * (D // 2), BLOCK) * BLOCK
    p_table += signs_at(LOG_D, REGULAR, DERIVE)
    if LIFT:
        mask = (item >= 0) & (item < D)
        sign = _column_sign(p_angles, item, mask & (item < WIDTH), PAIRS, REGULAR)
        gl.store(p_table + item, sign, mask=mask)
    item -= gl.cdiv(D, BLOCK) * BLOCK
    if IRREGULAR > 0:
        mask = (item >= 0) & (item < IRREGULAR * D)
        stage, column = item // D, item % D
        pair = gl.load(p_pair + item, mask=mask, other=-1)
        # A column that is first of its pair names it; the other one asks its partner.
        partner = gl.load(p_partner + item, mask=mask, other=0)
        others = gl.load(p_pair + stage * D + partner, mask=mask, other=-1)
        both = gl.maximum(pair, others)
        p_theta = p_angles + (REGULAR + stage) * PAIRS + both
        theta = gl.load(p_theta, mask=mask & (both >= 0), other=0.0)
        sin = direction * gl.sin(theta)
        o = D + 2 * stage * D + column
        gl.store(p_table + o, gl.cos(theta), mask=mask)
        gl.store(p_table + o + D, gl.where(pair >= 0, -sin, sin), mask=mask)


@jit(do_not_specialize=["experts", "programs"])
def collect_kernel(
    p_scratch, p_angles, p_plan, p_dangles, experts, programs,
    WIDTH: constexpr, REGULAR: constexpr, IRREGULAR: constexpr, HEIGHT: constexpr,
    DOWN: constexpr, LIFT: constexpr, PIECES: constexpr, BLOCK: constexpr,
    WARPS: constexpr,
):  # fmt: skip
    """Program (expert, block): sum a block of the expert's angle gradients over its slices."""
    PAIRS: constexpr = WIDTH // 2
    SIZE: constexpr = (REGULAR + IRREGULAR) * PAIRS
    expert, block = gl.program_id(0), gl.program_id(1)
    rows = gl.load(p_plan + expert + 1) - gl.load(p_plan + expert)
    p_last_tile = p_plan + experts + 1
    last = gl.load(p_last_tile + expert)
    share = (gl.load(p_last_tile + experts - 1) + programs - 1) // programs
    first = (last - (rows + HEIGHT - 1) // HEIGHT) // share
    stop = gl.where(rows > 0, (last + share - 1) // share, first)
    item, piece = block * BLOCK + grid_columns(BLOCK, WARPS), grid_rows(PIECES, WARPS)
    sums = (item * 0 + piece * 0).to(gl.float32)
    for start in range(first, stop, PIECES):
        i = start + piece
        p_piece = p_scratch + (i + expert).to(gl.int64) * SIZE
        sums += gl.load(p_piece + item, mask=(i < stop) & (item < SIZE), other=0.0)
    total = gl.sum(sums, axis=0)
    item = block * BLOCK + numbers_like(total, BLOCK)
    mask = item < SIZE
    p_angles += expert.to(gl.int64) * SIZE
    if LIFT:
        stage, pair = item // PAIRS, item % PAIRS
        shear = mask & (stage < REGULAR)
        total *= _pair_sign(p_angles, stage, pair, shear, PAIRS, REGULAR, DOWN)
    if not DOWN:  # the walk up undoes a rotation by -theta
        total = -total
    gl.store(p_dangles + expert.to(gl.int64) * SIZE + item, total, mask=mask)
