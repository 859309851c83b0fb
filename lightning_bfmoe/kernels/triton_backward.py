"""The gradient of the fused rotation, see `triton_rotation`: one pass over outputs and gradient.

It is reversible: from the outputs and their gradient it walks the stages back, so nothing but the
output is saved. The gradients of the angles stay in registers, or some in shared memory, while the
rows of an expert last, then go to a slice of scratch memory; `triton_tables` sums them in a fixed
order. Where they do not fit, several launches walk the stages and each sums some.
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
from lightning_bfmoe.kernels.triton_layout import (
    constexpr,
    gl,
    group_of,
    jit,
    move,
    move_by_row,
    numbers_like,
    pause,
    shared_sums,
    signs_at,
    stage_at,
    table_size,
    tile,
    walked,
    zeros,
)
from lightning_bfmoe.kernels.triton_rotation import first_expert, worker_of
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
def _undo(
    y, g, sums, p_table, p_partner,
    S: constexpr, ADD: constexpr, LOG_D: constexpr, REGULAR: constexpr, SPREAD: constexpr,
    ROWS: constexpr, BESIDE: constexpr, WARPS: constexpr, DOWN: constexpr, LIFT: constexpr,
    DERIVE: constexpr, BY_ROW: constexpr,
):  # fmt: skip
    """`_stage` for outputs and gradient; with ADD the angle's gradient, g2 y1 - g1 y2, to sums."""
    D: constexpr = 2**LOG_D
    LAYOUT: constexpr = tile(LOG_D, SPREAD, WARPS, ROWS, REGULAR, group_of(S, REGULAR, SPREAD))
    if BY_ROW:
        y, g = move_by_row(y, LAYOUT), move_by_row(g, LAYOUT)
    else:
        y, g = move(y, LAYOUT), move(g, LAYOUT)
    if S >= REGULAR:
        partner = partners(y, p_partner + (S - REGULAR) * D, D)
        p_stage = p_table + stage_at(S, LOG_D, REGULAR, DERIVE)
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
        a, b = coefficients(p_table + stage_at(S, LOG_D, REGULAR, DERIVE), y1, D, DERIVE)
        y1, y2 = turn(y1, y2, a, b, LIFT)
        g1, g2 = turn(g1, g2, a, b, LIFT)
        y = merge(y1, y2, ROWS, BESIDE, D, 2**S)
        g = merge(g1, g2, ROWS, BESIDE, D, 2**S)
        if LIFT and walked(REGULAR - 1, REGULAR, DOWN) == S:
            p_signs = p_table + signs_at(LOG_D, REGULAR, DERIVE)
            y, g = signed(y, p_signs, D), signed(g, p_signs, D)
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
    LIFT: constexpr, DERIVE: constexpr, NEAR: constexpr, FIRST: constexpr, STOP: constexpr,
    SHARED: constexpr,
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
    worker = worker_of(NEAR)
    begin = worker * share
    end = gl.minimum(begin + share, total)
    expert = first_expert(p_last_tile, begin, experts, WARPS)
    stored = ()
    for i in gl.static_range(FIRST, FIRST + SHARED):
        stored = stored + (
            gl.allocate_shared_memory(
                gl.float32, [BESIDE, 2**LOG_D // 2],
                shared_sums(
                    LOG_D, SPREAD, WARPS, REGULAR, walked(i, STAGES, DOWN),
                    group_of(walked(i, STAGES, DOWN), REGULAR, SPREAD),
                ),
            ),
        )  # fmt: skip
    while begin < end:
        last_tile = gl.load(p_last_tile + expert)
        first_row_of, last_row = gl.load(p_plan + expert), gl.load(p_plan + expert + 1)
        first_tile = last_tile - (last_row - first_row_of + HEIGHT - 1) // HEIGHT
        p_expert = p_table + expert.to(gl.int64) * table_size(LOG_D, REGULAR, IRREGULAR, DERIVE)
        stop = gl.minimum(end, last_tile)
        sums = ()
        for i in gl.static_range(FIRST, STOP):
            nothing = _no_sums(
                walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD, ROWS, BESIDE, WARPS
            )  # fmt: skip
            if i - FIRST < SHARED:
                stored[i - FIRST].store(nothing)
            else:
                sums = sums + (nothing,)
        for number in range(begin, stop):
            row = first_row_of + (number - first_tile) * HEIGHT
            at = row.to(gl.int64) * WIDTH
            o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, START)
            y = gl.load(p_y + at + o, mask=mask, other=0.0).to(gl.float32)
            g = gl.load(p_g + at + o, mask=mask, other=0.0).to(gl.float32)
            more = ()
            for i in gl.static_range(STOP):
                if i >= FIRST and i - FIRST < SHARED:
                    y, g, added = _undo(
                        y, g, _no_sums(
                            walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD, ROWS, BESIDE, WARPS
                        ),
                        p_expert, p_partner, walked(i, STAGES, DOWN), True, LOG_D, REGULAR, SPREAD,
                        ROWS, BESIDE, WARPS, DOWN, LIFT, DERIVE,
                        SHARED > 0 and ROWS == 2,
                    )  # fmt: skip
                    here = stored[i - FIRST]
                    here.store(here.load(added.type.layout) + added)
                else:
                    y, g, added = _undo(
                        y, g, sums[i - FIRST - SHARED if i >= FIRST else 0], p_expert, p_partner,
                        walked(i, STAGES, DOWN), i >= FIRST, LOG_D, REGULAR, SPREAD, ROWS,
                        BESIDE, WARPS, DOWN, LIFT, DERIVE,
                        SHARED > 0 and ROWS == 2,
                    )  # fmt: skip
                    if i >= FIRST:
                        more = more + (added,)
                row = pause(row)
            sums = more
            if STOP == STAGES:
                o, mask = offsets(last_row - row, WIDTH, ROWS, BESIDE, 2**LOG_D, END)
                if SHARED > 0 and ROWS == 2:
                    g = move_by_row(g, END)
                gl.store(p_dx + at + o, move(g, END).to(p_dx.dtype.element_ty), mask=mask)
        # Of any two programs and experts met on the way only one pair has this sum.
        piece = (worker + expert).to(gl.int64) * (STAGES * (WIDTH // 2))
        for i in gl.static_range(FIRST, STOP):
            if i - FIRST < SHARED:
                nothing = _no_sums(
                    walked(i, STAGES, DOWN), LOG_D, REGULAR, SPREAD, ROWS, BESIDE, WARPS
                )  # fmt: skip
                total_here = stored[i - FIRST].load(nothing.type.layout)
            else:
                total_here = sums[i - FIRST - SHARED]
            _keep(
                total_here, p_scratch + piece, p_pair, walked(i, STAGES, DOWN), WIDTH,
                2**LOG_D, REGULAR,
            )  # fmt: skip
        begin = stop
        expert += 1
