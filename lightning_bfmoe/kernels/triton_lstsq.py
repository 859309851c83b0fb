r"""Kernel that blends rows towards their exact least-squares ternary form, without sorting them.

Of a row's magnitudes those above a threshold t are kept; with S(t) their sum and n(t) their number
the best t maximises the gain S / sqrt(n). The kept ones are then those above about half their mean
alpha = S / n: with k kept, the next number x raises the gain if and only if

.. math:: x > \alpha_k / (1 + \sqrt{1 + 1 / k}) .

There can be several such t. The search cuts a window of thresholds into pieces, computes S and n at
every edge (one pass over the row's registers) and goes on with the pieces that may hold a better t
than the best seen. A piece from e to e' cannot when it holds one number at most, when all of it
lies above alpha(e') / 2 (keeping all of it is better) or below the bound above (keeping none is),
or when even S(e) / sqrt(n(e') + (S(e) - S(e')) / e') gains less. From the best t the rule above,
repeated, leads to the last number: that is better conditioned than comparing gains, which differ by
1e-8 there.

Imported only where triton is installed (`kernels.quantize_cuda` does).
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl

from lightning_bfmoe.kernels.triton_quantize import blended

SLACK = tl.constexpr(1.000001)  # for sums in float32
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_pairs(total, count, other_total, other_count):
    return total + other_total, count + other_count


@triton.jit
def _kept(size, threshold):
    """Sum and number of what is at least the threshold."""
    keep = size >= threshold
    if INTERPRETED:  # it would add up pairs number by number, in seconds
        return tl.sum(tl.where(keep, size, 0.0), axis=0), tl.sum(keep.to(tl.float32), axis=0)
    return tl.reduce((tl.where(keep, size, 0.0), keep.to(tl.float32)), 0, _add_pairs)


@triton.jit
def _next_bound(total, count):
    """What a number must exceed to be worth keeping beside `count` others."""
    return tl.div_rn(total, count) / (1.0 + tl.sqrt(1.0 + 1.0 / count))


@triton.jit
def _best_threshold(size, D: tl.constexpr, PIECES: tl.constexpr):
    """The threshold, and sum and number of what it keeps; fillers in `size` are negative."""
    high = tl.max(size, axis=0)
    high_total, high_count = _kept(size, high)
    best, total, count = high, high_total, high_count
    # A good start for most distributions, so that few pieces are looked into.
    start = tl.minimum(0.75 * tl.sum(tl.maximum(size, 0.0), axis=0) / D, high)
    start_total, start_count = _kept(size, start)
    if start_total * tl.sqrt(count) > total * tl.sqrt(start_count):
        best, total, count = start, start_total, start_count
    low = high * 0.0
    steps = tl.where((high > 0.0) & (high < float("inf")), 40, 0)
    while steps > 0:
        width = (high - low) / PIECES
        above, above_total, above_count = high, high_total, high_count
        found = 0
        next_low = low
        next_high, next_total, next_count = high, high_total, high_count
        for piece in range(1, PIECES + 1):
            edge = tl.where(piece == PIECES, low, high - width * piece)
            edge_total, edge_count = _kept(size, edge)
            if edge_total * tl.sqrt(count) > total * tl.sqrt(edge_count):
                best, total, count = edge, edge_total, edge_count
            most = edge_total / tl.sqrt(above_count + (edge_total - above_total) / above)
            hopeful = (edge_count > above_count + 1.5) & (most * tl.sqrt(count) > total)
            hopeful &= 2.0 * edge * above_count <= above_total * SLACK
            lowest = tl.div_rn(edge_total, edge_count) / (1.0 + tl.sqrt(1.0 + 1.0 / above_count))
            hopeful &= above * SLACK > lowest
            # Selected: the compiler (3.6) loses what an `if` within an `if` assigns.
            first = hopeful & (found == 0)
            next_high = tl.where(first, above, next_high)
            next_total = tl.where(first, above_total, next_total)
            next_count = tl.where(first, above_count, next_count)
            next_low = tl.where(hopeful, edge, next_low)
            found = tl.where(hopeful, 1, found)
            above, above_total, above_count = edge, edge_total, edge_count
        low = next_low
        high, high_total, high_count = next_high, next_total, next_count
        # The rest is left to the rule: a window this narrow holds no gain that float32 shows.
        steps = tl.where((found == 1) & (high - low > 0.0005 * high), steps - 1, 0)
    steps = 16
    while steps > 0:
        edge = _next_bound(total, count)
        edge_total, edge_count = _kept(size, edge)
        moved = edge_count != count
        if moved & (edge_total * tl.sqrt(count) * SLACK >= total * tl.sqrt(edge_count)):
            best, total, count = edge, edge_total, edge_count
            steps -= 1
        else:
            steps = 0
    return best, total, count


@triton.jit
def lstsq_rows_kernel(
    p_weight, p_blend, p_out, D: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr
):
    """The exact least-squares scale of one row, and the row blended with it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    w = tl.load(p_weight + row * D + column, mask=column < D, other=0.0)
    size = tl.abs(w)
    threshold, total, count = _best_threshold(tl.where(column < D, size, -1.0), D, PIECES)
    spoilt = tl.sum(size, axis=0)
    alpha = tl.where(spoilt == spoilt, tl.div_rn(total, count), spoilt)  # NaN shows in the scale
    out = blended(w, (size >= threshold) & (w != 0), alpha, p_blend)
    tl.store(p_out + row * D + column, out.to(p_out.dtype.element_ty), mask=column < D)
