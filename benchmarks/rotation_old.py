"""Triton kernels of the fused rotation: all regular stages in one launch, fp32 maths inside.

A program holds a tile of rows of ONE expert in registers: [R, D] numbers, D = 2^p the power-of-two
part of the width. Rows are read and written once, cos and sin once a tile. The backward kernel is
reversible: from the outputs and their gradient it walks the stages back, so nothing but the output
is saved, and adds each tile's angle gradient to its expert's.

The kernel before the Gluon one, kept until one run on a GPU has compared them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pairs(x, R: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """[R, D] -> both members of the pairs (j, j + STRIDE), each [R, D / 2] in pair order."""
    x = tl.reshape(x, (R, D // (2 * STRIDE), 2, STRIDE))
    first, second = tl.split(tl.permute(x, (0, 1, 3, 2)))  # (R, D / 2S, S)
    return tl.reshape(first, (R, D // 2)), tl.reshape(second, (R, D // 2))


@triton.jit
def _merge(first, second, R: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """The inverse of `_pairs`."""
    first = tl.reshape(first, (R, D // (2 * STRIDE), STRIDE))
    second = tl.reshape(second, (R, D // (2 * STRIDE), STRIDE))
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (R, D))


@triton.jit
def _rotate(x, cos, sin, R: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    x1, x2 = _pairs(x, R, D, STRIDE)
    return _merge(cos * x1 - sin * x2, sin * x1 + cos * x2, R, D, STRIDE)


@triton.jit
def _angle_gradient(y, g, R: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """Sum over rows of g2 y1 - g1 y2, [D / 2]: the derivative by the angle, from the outputs."""
    y1, y2 = _pairs(y, R, D, STRIDE)
    g1, g2 = _pairs(g, R, D, STRIDE)
    return tl.sum(g2 * y1 - g1 * y2, axis=0)


@triton.jit
def rotate_fwd_kernel(
    p_x, p_y, p_cos, p_sin, p_expert, p_row, p_end,
    WIDTH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, TOTAL: tl.constexpr,
    PAIRS: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Tile program_id(0), block program_id(1) of D columns; STAGES of the TOTAL stages."""
    i_tile, i_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(p_expert + i_tile).to(tl.int64)
    rows = tl.load(p_row + i_tile) + tl.arange(0, R)
    mask = (rows < tl.load(p_end + i_tile))[:, None]
    o_x = rows.to(tl.int64)[:, None] * WIDTH + i_block * D + tl.arange(0, D)[None, :]
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)  # [R, D]
    o_angle = expert * TOTAL * PAIRS + i_block * (D // 2) + tl.arange(0, D // 2)
    for i in tl.static_range(STAGES):
        if INVERSE:
            o_stage = o_angle + (STAGES - 1 - i) * PAIRS
            cos, sin = tl.load(p_cos + o_stage)[None, :], -tl.load(p_sin + o_stage)[None, :]
            x = _rotate(x, cos, sin, R, D, 2 ** (STAGES - 1 - i))
        else:
            o_stage = o_angle + i * PAIRS
            cos, sin = tl.load(p_cos + o_stage)[None, :], tl.load(p_sin + o_stage)[None, :]
            x = _rotate(x, cos, sin, R, D, 2**i)
    tl.store(p_y + o_x, x.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def rotate_bwd_kernel(
    p_y, p_g, p_dx, p_x, p_dangles, p_cos, p_sin, p_expert, p_row, p_end,
    WIDTH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, TOTAL: tl.constexpr,
    PAIRS: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr, KEEP_X: tl.constexpr,
):  # fmt: skip
    """Walks the stages back. KEEP_X also writes the recomputed input, for stages before these."""
    i_tile, i_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(p_expert + i_tile).to(tl.int64)
    row = tl.load(p_row + i_tile)
    end = tl.load(p_end + i_tile)
    rows = row + tl.arange(0, R)
    mask = (rows < end)[:, None]
    o_x = rows.to(tl.int64)[:, None] * WIDTH + i_block * D + tl.arange(0, D)[None, :]
    y = tl.load(p_y + o_x, mask=mask, other=0.0).to(tl.float32)  # [R, D]
    g = tl.load(p_g + o_x, mask=mask, other=0.0).to(tl.float32)  # [R, D]
    o_angle = expert * TOTAL * PAIRS + i_block * (D // 2) + tl.arange(0, D // 2)
    used = row < end  # a spare tile holds no row and adds nothing
    for i in tl.static_range(STAGES):
        if INVERSE:
            o_stage = o_angle + i * PAIRS
            cos, sin = tl.load(p_cos + o_stage)[None, :], tl.load(p_sin + o_stage)[None, :]
            tl.atomic_add(p_dangles + o_stage, -_angle_gradient(y, g, R, D, 2**i), mask=used)
            y = _rotate(y, cos, sin, R, D, 2**i)
            g = _rotate(g, cos, sin, R, D, 2**i)
        else:
            o_stage = o_angle + (STAGES - 1 - i) * PAIRS
            cos, sin = tl.load(p_cos + o_stage)[None, :], -tl.load(p_sin + o_stage)[None, :]
            delta = _angle_gradient(y, g, R, D, 2 ** (STAGES - 1 - i))
            tl.atomic_add(p_dangles + o_stage, delta, mask=used)
            y = _rotate(y, cos, sin, R, D, 2 ** (STAGES - 1 - i))
            g = _rotate(g, cos, sin, R, D, 2 ** (STAGES - 1 - i))
    tl.store(p_dx + o_x, g.to(p_dx.dtype.element_ty), mask=mask)
    if KEEP_X:
        tl.store(p_x + o_x, y.to(p_x.dtype.element_ty), mask=mask)


class RowTiles(NamedTuple):
    """Tiles of at most R sorted rows of one expert; spare tiles at the end hold no row."""

    expert: Tensor  # (tiles,) int32
    row: Tensor  # (tiles,) int32, first row
    end: Tensor  # (tiles,) int32, one past the last row; row == end in a spare tile


def row_tiles(counts: Tensor, rows: int, height: int) -> RowTiles:
    """Cut sorted rows into tiles without asking the device how many there are.

    Example:
        >>> tiles = row_tiles(torch.tensor([3, 0, 1]), rows=4, height=2)
        >>> tiles.expert.tolist(), tiles.row.tolist(), tiles.end.tolist()
        ([0, 0, 2, 2, 2], [0, 2, 3, 4, 4], [2, 3, 4, 4, 4])
    """
    num_experts = counts.shape[0]
    tiles_of = (counts + height - 1) // height
    last = tiles_of.cumsum(0)  # one past the expert's last tile
    tile = torch.arange(rows // height + num_experts, device=counts.device)
    expert = torch.searchsorted(last, tile, right=True)
    inside = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    stop = counts.cumsum(0)
    row = (stop - counts)[expert] + (tile - (last - tiles_of)[expert]) * height
    row = torch.where(inside, row, rows)
    end = torch.where(inside, torch.minimum(row + height, stop[expert]), rows)
    return RowTiles(expert.int(), row.int(), end.int())


def _launch_shape(d: int, backward: bool) -> tuple[int, int]:
    """(rows a tile, warps a program): about 4096 numbers a tile, 16 to 32 a thread."""
    height = max(4096 // d, 1)
    numbers = height * d * (2 if backward else 1)
    return min(height, 64), min(max(numbers // (32 * 32), 1), 16)


def forward(x, angles, counts, inverse=False):
    """The regular stages, widths that are powers of two."""
    (rows, d), (_, stages, pairs) = x.shape, angles.shape
    height, warps = _launch_shape(d, backward=False)
    tiles = row_tiles(counts, rows, height)
    y = torch.empty_like(x)
    rotate_fwd_kernel[(tiles.expert.shape[0], 1)](
        x, y, angles.cos(), angles.sin(), tiles.expert, tiles.row, tiles.end,
        WIDTH=d, D=d, STAGES=stages, TOTAL=stages, PAIRS=pairs, R=height, INVERSE=inverse,
        num_warps=warps,
    )  # fmt: skip
    return y


def backward(y, grad, angles, counts, inverse=False):
    """Gradients by the rows and by the angles."""
    (rows, d), (_, stages, pairs) = y.shape, angles.shape
    height, warps = _launch_shape(d, backward=True)
    tiles = row_tiles(counts, rows, height)
    dx, dangles = torch.empty_like(y), torch.zeros_like(angles)
    rotate_bwd_kernel[(tiles.expert.shape[0], 1)](
        y, grad, dx, dx, dangles, angles.cos(), angles.sin(), tiles.expert, tiles.row, tiles.end,
        WIDTH=d, D=d, STAGES=stages, TOTAL=stages, PAIRS=pairs, R=height, INVERSE=inverse,
        KEEP_X=False, num_warps=warps,
    )  # fmt: skip
    return dx, dangles
