"""Kernels of the fused rotation: all stages in one pass over the rows, fp32 maths inside.

A program walks tiles of rows of ONE expert at a time, in registers. Stages are taken in groups of
SPREAD: in the layout of a group both numbers of every pair of its stages lie in one thread, so that
numbers move between threads only from group to group. A pair (x1, x2) is turned by three shears,
three fused multiply-adds where the definition takes four instructions,

    x1 -= a x2;  x2 += b x1;  x1 -= a x2      a = tan(theta / 2), b = sin(theta),

with theta reduced to |theta| <= pi/2; the sign this leaves on each column is multiplied in after
the last regular stage (`triton_tables` prepares a, b and the signs). The irregular stages of a
width that is no power of two pair columns that no layout brings together; there each number
fetches its partner.

The backward kernel is reversible: from the outputs and their gradient it walks the stages back, so
nothing but the output is saved. The gradients of the angles stay in registers while the rows of an
expert last, then go to a slice of scratch memory; `triton_tables` sums them in a fixed order.
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
    numbers_like,
    pause,
    table_size,
    tile,
    walked,
    zeros,
)
from lightning_bfmoe.kernels.triton_stage import (
    add_rows,
    blend,
    coefficients,
    first_row,
    merge,
    offsets,
    pairs,
    partners,
    signed,
    turn,
)


@jit
def _first_expert(p_last_tile, number, experts, WARPS: constexpr):
    """The expert whose rows tile `number` holds: how many experts end at or before it."""
    found = 0
    for start in range(0, experts, 256):
        expert = start + numbers(256, line(WARPS))
        last = gl.load(p_last_tile + expert, mask=expert < experts, other=2147483647)
        found += gl.sum((last <= number).to(gl.int32), axis=0)
    return found


@jit
def _stage(
    x, p_table, p_partner,
    S: constexpr, LOG_D: constexpr, REGULAR: constexpr, SPREAD: constexpr, ROWS: constexpr,
    BESIDE: constexpr, WARPS: constexpr, DOWN: constexpr, LIFT: constexpr,
):  # fmt: skip
    D: constexpr = 2**LOG_D
    x = move(x, tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD)))
    if S >= REGULAR:
        other = gl.gather(x, partners(x, p_partner + (S - REGULAR) * D, D), 2)
        x = blend(x, other, p_table + (2 * S + 1 - REGULAR) * D, D)
    else:
        x1, x2 = pairs(x, ROWS, BESIDE, D, 2**S)
        a, b = coefficients(p_table + S * D, x1, D)
        x1, x2 = turn(x1, x2, a, b, LIFT)
        x = merge(x1, x2, ROWS, BESIDE, D, 2**S)
        if LIFT and walked(REGULAR - 1, REGULAR, DOWN) == S:
            x = signed(x, p_table + REGULAR * D, D)
    return x


@jit(do_not_specialize=["experts"])
def rotate_kernel(
    p_x, p_y, p_table, p_partner, p_plan, experts,
    WIDTH: constexpr, LOG_D: constexpr, REGULAR: constexpr, IRREGULAR: constexpr,
    SPREAD: constexpr, ROWS: constexpr, WARPS: constexpr, DOWN: constexpr,
    LIFT: constexpr,
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
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, total)
    expert = _first_expert(p_last_tile, begin, experts, WARPS)
    while begin < end:
        last_tile = gl.load(p_last_tile + expert)
        first_row_of, last_row = gl.load(p_plan + expert), gl.load(p_plan + expert + 1)
        # Counted from the expert's last tile; only that one may be cut off.
        first_tile = last_tile - (last_row - first_row_of + HEIGHT - 1) // HEIGHT
        p_expert = p_table + expert.to(gl.int64) * table_size(LOG_D, REGULAR, IRREGULAR)
        stop = gl.minimum(end, last_tile)
        for number in range(begin, stop):
            row = first_row_of + (number - first_tile) * HEIGHT
            at = row.to(gl.int64) * WIDTH
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, START)
            x = gl.load(p_x + at + o, mask=mask, other=0.0).to(gl.float32)
            for i in gl.static_range(STAGES):
                x = _stage(
                    x, p_expert, p_partner, walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD,
                    ROWS, BESIDE, WARPS, DOWN, LIFT,
                )  # fmt: skip
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, END)
            gl.store(p_y + at + o, move(x, END).to(p_y.dtype.element_ty), mask=mask)
        begin = stop
        expert += 1


@jit
def _undo(
    y, g, sums, p_table, p_partner,
    S: constexpr, ADD: constexpr, LOG_D: constexpr, REGULAR: constexpr, SPREAD: constexpr,
    ROWS: constexpr, BESIDE: constexpr, WARPS: constexpr, DOWN: constexpr, LIFT: constexpr,
):  # fmt: skip
    """`_stage` for outputs and gradient; with ADD the angle's gradient, g2 y1 - g1 y2, to sums."""
    D: constexpr = 2**LOG_D
    y = move(y, tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD)))
    g = move(g, tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD)))
    if S >= REGULAR:
        partner = partners(y, p_partner + (S - REGULAR) * D, D)
        p_stage = p_table + (2 * S + 1 - REGULAR) * D
        y2, g2 = gl.gather(y, partner, 2), gl.gather(g, partner, 2)
        if ADD:
            sums = add_rows(sums, g2, y, False, ROWS, BESIDE, D)
            sums = add_rows(sums, g, y2, True, ROWS, BESIDE, D)
        y, g = blend(y, y2, p_stage, D), blend(g, g2, p_stage, D)
    else:
        y1, y2 = pairs(y, ROWS, BESIDE, D, 2**S)
        g1, g2 = pairs(g, ROWS, BESIDE, D, 2**S)
        if ADD:
            sums = add_rows(sums, g2, y1, False, ROWS, BESIDE, D // 2)
            sums = add_rows(sums, g1, y2, True, ROWS, BESIDE, D // 2)
        a, b = coefficients(p_table + S * D, y1, D)
        y1, y2 = turn(y1, y2, a, b, LIFT)
        g1, g2 = turn(g1, g2, a, b, LIFT)
        y = merge(y1, y2, ROWS, BESIDE, D, 2**S)
        g = merge(g1, g2, ROWS, BESIDE, D, 2**S)
        if LIFT and walked(REGULAR - 1, REGULAR, DOWN) == S:
            y, g = signed(y, p_table + REGULAR * D, D), signed(g, p_table + REGULAR * D, D)
    return y, g, sums


@jit
def _no_sums(
    S: constexpr, LOG_D: constexpr, REGULAR: constexpr, SPREAD: constexpr,
    ROWS: constexpr, BESIDE: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Zeros where `_undo` adds up: [BESIDE, D / 2], or [BESIDE, D] in an irregular stage."""
    D: constexpr = 2**LOG_D
    LAYOUT: constexpr = tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD))
    nothing = zeros(ROWS, BESIDE, D, LAYOUT)
    if S >= REGULAR:
        nothing = first_row(nothing, ROWS, BESIDE, D)
    else:
        nothing, _ = pairs(nothing, ROWS, BESIDE, D, 2**S)
        nothing = first_row(nothing, ROWS, BESIDE, D // 2)
    return nothing


@jit
def _keep(
    sums, p_slice, p_pair,
    S: constexpr, WIDTH: constexpr, D: constexpr, REGULAR: constexpr,
):  # fmt: skip
    """Write the sums of a stage to a slice [STAGES, WIDTH / 2]."""
    sums = gl.sum(sums, axis=0)
    if S >= REGULAR:  # each pair is summed twice, with both signs: keep the first member's
        column = numbers_like(sums, D)
        pair = gl.load(p_pair + (S - REGULAR) * D + column)
        gl.store(p_slice + S * (WIDTH // 2) + pair, sums, mask=pair >= 0)
    else:
        pair = numbers_like(sums, D // 2)
        gl.store(p_slice + S * (WIDTH // 2) + pair, sums, mask=pair < WIDTH // 2)


@jit(do_not_specialize=["experts"])
def rotate_back_kernel(
    p_y, p_g, p_dx, p_scratch, p_table, p_partner, p_pair, p_plan, experts,
    WIDTH: constexpr, LOG_D: constexpr, REGULAR: constexpr, IRREGULAR: constexpr,
    SPREAD: constexpr, ROWS: constexpr, WARPS: constexpr, DOWN: constexpr,
    LIFT: constexpr, FIRST: constexpr, STOP: constexpr,
):  # fmt: skip
    """Walk the stages back; sums of the stages FIRST .. STOP-1 of the walk go to the scratch.

    The gradient of the rows is written by the launch that walks to the end.
    """
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
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, total)
    expert = _first_expert(p_last_tile, begin, experts, WARPS)
    while begin < end:
        last_tile = gl.load(p_last_tile + expert)
        first_row_of, last_row = gl.load(p_plan + expert), gl.load(p_plan + expert + 1)
        first_tile = last_tile - (last_row - first_row_of + HEIGHT - 1) // HEIGHT
        p_expert = p_table + expert.to(gl.int64) * table_size(LOG_D, REGULAR, IRREGULAR)
        stop = gl.minimum(end, last_tile)
        sums = ()
        for i in gl.static_range(FIRST, STOP):
            sums = sums + (
                _no_sums(
                    walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD, ROWS, BESIDE, WARPS
                ),
            )  # fmt: skip
        for number in range(begin, stop):
            row = first_row_of + (number - first_tile) * HEIGHT
            at = row.to(gl.int64) * WIDTH
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, START)
            y = gl.load(p_y + at + o, mask=mask, other=0.0).to(gl.float32)
            g = gl.load(p_g + at + o, mask=mask, other=0.0).to(gl.float32)
            more = ()
            for i in gl.static_range(STOP):
                y, g, added = _undo(
                    y, g, sums[i - FIRST if i >= FIRST else 0], p_expert, p_partner,
                    walked(i, STAGES, DOWN), i >= FIRST, LOG_D, REGULAR, SPREAD, ROWS,
                    BESIDE, WARPS, DOWN, LIFT,
                )  # fmt: skip
                if i >= FIRST:
                    more = more + (added,)
                row = pause(row)
            sums = more
            if STOP == STAGES:
                o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, END)
                gl.store(p_dx + at + o, move(g, END).to(p_dx.dtype.element_ty), mask=mask)
        # Of any two programs and experts met on the way only one pair has this sum.
        piece = (gl.program_id(0) + expert).to(gl.int64) * (STAGES * (WIDTH // 2))
        for i in gl.static_range(FIRST, STOP):
            _keep(
                sums[i - FIRST], p_scratch + piece, p_pair, walked(i, STAGES, DOWN), WIDTH,
                2**LOG_D, REGULAR,
            )  # fmt: skip
        begin = stop
        expert += 1
