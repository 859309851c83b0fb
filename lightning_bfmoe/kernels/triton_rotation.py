"""Kernel of the fused rotation: all stages in one pass over the rows, fp32 maths inside.

A program walks tiles of rows of ONE expert at a time, in registers. Stages are taken in groups of
SPREAD: in the layout of a group both numbers of every pair of its stages lie in one thread, so that
numbers move between threads only from group to group. A pair (x1, x2) is turned by three shears,
three fused multiply-adds where the definition takes four instructions,

    x1 -= a x2;  x2 += b x1;  x1 -= a x2      a = tan(theta / 2), b = sin(theta),

with theta reduced to |theta| <= pi/2; the sign this leaves on each column is multiplied in after
the last regular stage (`triton_tables` prepares a, b and the signs). The irregular stages of a
width that is no power of two pair columns that no layout brings together; there each number
fetches its partner.

`triton_backward` holds the gradient.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
from lightning_bfmoe.kernels.triton_layout import (
    constexpr,
    gl,
    group_of,
    jit,
    line,
    move,
    numbers,
    signs_at,
    stage_at,
    table_size,
    tile,
    walked,
)
from lightning_bfmoe.kernels.triton_stage import (
    blend,
    coefficients,
    merge,
    offsets,
    pairs,
    partners,
    signed,
    turn,
)


@jit
def first_expert(p_last_tile, number, experts, WARPS: constexpr):
    """The expert whose rows tile `number` holds: how many experts end at or before it."""
    found = 0
    for start in range(0, experts, 256):
        expert = start + numbers(256, line(WARPS))
        last = gl.load(p_last_tile + expert, mask=expert < experts, other=2147483647)
        found += gl.sum((last <= number).to(gl.int32), axis=0)
    return found


@jit
def worker_of(NEAR: constexpr):
    """Which share of the tiles this program takes; NEAR programs of a multiprocessor adjoin.

    The hardware deals programs out to the multiprocessors one by one, so those that meet on one are
    far apart in number; with neighbouring shares they read the same expert's coefficients.
    """
    rounds = gl.num_programs(0) // NEAR
    return gl.program_id(0) % rounds * NEAR + gl.program_id(0) // rounds


@jit
def _stage(
    x, p_table, p_partner,
    S: constexpr, LOG_D: constexpr, REGULAR: constexpr, SPREAD: constexpr, ROWS: constexpr,
    BESIDE: constexpr, WARPS: constexpr, DOWN: constexpr, LIFT: constexpr, DERIVE: constexpr,
):  # fmt: skip
    D: constexpr = 2**LOG_D
    x = move(x, tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD)))
    if S >= REGULAR:
        other = gl.gather(x, partners(x, p_partner + (S - REGULAR) * D, D), 2)
        x = blend(x, other, p_table + stage_at(S, LOG_D, REGULAR, DERIVE), D)
    else:
        x1, x2 = pairs(x, ROWS, BESIDE, D, 2**S)
        a, b = coefficients(p_table + stage_at(S, LOG_D, REGULAR, DERIVE), x1, D, DERIVE)
        x1, x2 = turn(x1, x2, a, b, LIFT)
        x = merge(x1, x2, ROWS, BESIDE, D, 2**S)
        if LIFT and walked(REGULAR - 1, REGULAR, DOWN) == S:
            x = signed(x, p_table + signs_at(LOG_D, REGULAR, DERIVE), D)
    return x


@jit(do_not_specialize=["experts"])
def rotate_kernel(
    p_x, p_y, p_table, p_partner, p_plan, experts,
    WIDTH: constexpr, LOG_D: constexpr, REGULAR: constexpr, IRREGULAR: constexpr,
    SPREAD: constexpr, ROWS: constexpr, WARPS: constexpr, DOWN: constexpr,
    LIFT: constexpr, DERIVE: constexpr, NEAR: constexpr,
):  # fmt: skip
    """Program i walks its share of the tiles; DOWN takes the stages from the last to the first."""
    STAGES: constexpr = REGULAR + IRREGULAR
    BESIDE: constexpr = 32 * WARPS * 2**SPREAD // 2**LOG_D
    HEIGHT: constexpr = ROWS * BESIDE
    START: constexpr = tile(
        LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(walked(0, STAGES, DOWN), REGULAR, SPREAD)
    )
    END: constexpr = tile(
        LOG_D, SPREAD, WARPS, ROWS, REGULAR,
        group_of(walked(STAGES - 1, STAGES, DOWN), REGULAR, SPREAD),
    )  # fmt: skip
    p_last_tile = p_plan + experts + 1
    total = gl.load(p_last_tile + experts - 1)
    share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    worker = worker_of(NEAR)
    begin = worker * share
    end = gl.minimum(begin + share, total)
    expert = first_expert(p_last_tile, begin, experts, WARPS)
    while begin < end:
        last_tile = gl.load(p_last_tile + expert)
        first_row_of, last_row = gl.load(p_plan + expert), gl.load(p_plan + expert + 1)
        # Counted from the expert's last tile; only that one may be cut off.
        first_tile = last_tile - (last_row - first_row_of + HEIGHT - 1) // HEIGHT
        p_expert = p_table + expert.to(gl.int64) * table_size(LOG_D, REGULAR, IRREGULAR, DERIVE)
        stop = gl.minimum(end, last_tile)
        for number in range(begin, stop):
            row = first_row_of + (number - first_tile) * HEIGHT
            at = row.to(gl.int64) * WIDTH
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, START)
            x = gl.load(p_x + at + o, mask=mask, other=0.0).to(gl.float32)
            for i in gl.static_range(STAGES):
                x = _stage(
                    x, p_expert, p_partner, walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD,
                    ROWS, BESIDE, WARPS, DOWN, LIFT, DERIVE,
                )  # fmt: skip
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, END)
            gl.store(p_y + at + o, move(x, END).to(p_y.dtype.element_ty), mask=mask)
        begin = stop
        expert += 1
