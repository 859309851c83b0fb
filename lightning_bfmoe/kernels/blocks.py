r"""Rotation as a few batched matrix products: the two-factor (Monarch) form of a butterfly, exact.

c consecutive stages from stride 2^s on only mix the c bits s .. s+c-1 of the coordinate, so they
are one small 2^c x 2^c orthogonal matrix for each setting of the other bits: a block-diagonal
factor that a single `bmm` applies. For d = 512 nine stages become two factors (32 and 16 wide). The
blocks are built from the angles at every call and thrown away: stored, they would undo the
compression.

Rows come sorted by expert. They are laid out in tiles of equal height that never mix two experts,
so the shapes are static, no loop runs over experts, and no row is dropped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.functional.butterfly import rotate_stage, stage_pairs
from lightning_bfmoe.functional.routing import ExpertGroups

_MAX_FACTOR_STAGES = 6  # 64-wide blocks at most: wider ones cost more FLOPs than they save passes


class Tiles(NamedTuple):
    """Where each sorted row goes: tile t holds `height` slots of expert ``expert[t]``."""

    slot: Tensor  # (rows,) position in the padded layout
    expert: Tensor  # (tiles,)
    height: int


def tile_rows(groups: ExpertGroups, rows: int) -> Tiles:
    """Cut the sorted rows into tiles of one expert each; the last tile of an expert is padded."""
    num_experts, device = groups.num_experts, groups.counts.device
    height = _tile_height(rows, num_experts)
    tiles_of = (groups.counts + height - 1) // height  # (experts,)
    last_tile = tiles_of.cumsum(0)  # one past the expert's last tile
    first_row = groups.counts.cumsum(0) - groups.counts
    within = torch.arange(rows, device=device) - first_row[groups.expert]  # (rows,)
    slot = (last_tile - tiles_of)[groups.expert] * height + within
    if device.type == "cpu" and not torch.compiler.is_compiling():
        count = int(last_tile[-1])  # free on the CPU; elsewhere it would stop the queue
    else:
        count = rows // height + num_experts
    expert = torch.searchsorted(last_tile, torch.arange(count, device=device), right=True)
    return Tiles(slot, expert.clamp(max=num_experts - 1), height)


def _tile_height(rows: int, num_experts: int) -> int:
    """A power of two near a quarter of the mean load: little padding, products of useful size."""
    target = max(rows // (4 * num_experts), 1)
    return min(max(1 << (target.bit_length() - 1), 8), 128)


def factor_stages(d: int, stages: int) -> list[tuple[int, int]]:
    """The factors as (first stage, count); together they cover the regular stages.

    Regular are those with a power-of-two stride, 2^(s+1) | d. The irregular rest, when d is not a
    power of two, is applied stage by stage.

    Example:
        >>> factor_stages(512, 9), factor_stages(768, 10)
        ([(0, 5), (5, 4)], [(0, 4), (4, 4)])
    """
    regular = min((d & -d).bit_length() - 1, stages)
    if regular == 0:
        return []
    parts = -(-regular // _MAX_FACTOR_STAGES)
    parts = max(parts, 2 if regular > 4 else 1)
    sizes = [regular // parts + (i < regular % parts) for i in range(parts)]
    starts = [sum(sizes[:i]) for i in range(parts)]
    return list(zip(starts, sizes, strict=True))


def block_factor(angles: Tensor, start: int, count: int, d: int) -> Tensor:
    """The blocks of stages start .. start+count-1, shape (experts, outer, inner, n, n).

    n = 2^count, inner = 2^start, outer = d / (n * inner); block [e, a, o] maps the coordinates
    ``a * n * inner + j * inner + o`` (j = 0..n-1) among themselves.
    """
    experts, n, inner = angles.shape[0], 2**count, 2**start
    outer = d // (n * inner)
    blocks = angles.new_ones(experts, outer, inner, n, 1, 1)
    for j in range(count):  # blocks of width 2^j become blocks of width 2^(j+1)
        high, low = 2 ** (count - j - 1), 2**j
        theta = angles[:, start + j].reshape(experts, outer, high, low, inner)
        theta = theta.permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (experts, outer, inner, high, low, 1)
        cos, sin = theta.cos(), theta.sin()
        a, b = blocks.reshape(experts, outer, inner, high, 2, low, low).unbind(4)
        rows = torch.cat((cos * a, -sin * b), -1), torch.cat((sin * a, cos * b), -1)
        blocks = torch.cat(rows, -2)  # (experts, outer, inner, high, 2 low, 2 low)
    return blocks.squeeze(3)


def rotate_blocks(x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
    """Rotate sorted rows by their expert's angles; same function as `kernels.rotation.rotate`.

    Args:
        x: Rows sorted by expert, (rows, d), in the dtype of the computation.
        angles: (experts, stages, pairs), same dtype.
        groups: Which expert each row belongs to.
        inverse: Apply the transpose.

    Returns:
        (rows, d).
    """
    rows, d = x.shape
    stages = angles.shape[1]
    factors = factor_stages(d, stages)
    regular = sum(count for _, count in factors)
    if inverse:
        x = irregular_stages(x, angles, groups, regular, inverse)
    if factors:
        tiles = tile_rows(groups, rows)
        tiled = x.new_zeros(tiles.expert.numel() * tiles.height, d).index_copy(0, tiles.slot, x)
        tiled = tiled.reshape(-1, tiles.height, d)  # (tiles, height, d)
        for start, count in reversed(factors) if inverse else factors:
            blocks = block_factor(angles, start, count, d).index_select(0, tiles.expert)
            tiled = _apply_factor(tiled, blocks, inverse)
        x = tiled.reshape(-1, d).index_select(0, tiles.slot)
    if not inverse:
        x = irregular_stages(x, angles, groups, regular, inverse)
    return x


def _apply_factor(tiled: Tensor, blocks: Tensor, inverse: bool) -> Tensor:
    tiles, height, d = tiled.shape
    _, outer, inner, n, _ = blocks.shape
    view = tiled.reshape(tiles, height, outer, n, inner)
    equation = "thami,taikm->thaki" if not inverse else "thami,taimk->thaki"
    return torch.einsum(equation, view, blocks).reshape(tiles, height, d)


def irregular_stages(
    x: Tensor, angles: Tensor, groups: ExpertGroups, start: int, inverse: bool
) -> Tensor:
    """Stages from `start` on, one by one, each row by its expert's angles."""
    stages = angles.shape[1]
    if start == stages:
        return x
    first, second = stage_pairs(x.shape[1], stages, x.device)
    rest = angles[:, start:]
    cos, sin = rest.cos(), rest.sin()
    sin = -sin if inverse else sin
    order = range(stages - start)
    for s in reversed(order) if inverse else order:
        row_cos, row_sin = cos[:, s][groups.expert], sin[:, s][groups.expert]  # (rows, pairs)
        x = rotate_stage(x, row_cos, row_sin, first[start + s], second[start + s])
    return x
