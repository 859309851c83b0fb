"""The fused rotation on CUDA: an opaque torch op around the Triton kernels.

The regular stages (power-of-two strides, see `kernels.blocks.factor_stages`) run fused. The
irregular rest of a width that is no power of two runs stage by stage in plain PyTorch.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.blocks import irregular_stages

MAX_FUSED = 8192  # a row of the block must fit the registers of one program


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


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def suits_cuda(x: Tensor, angles: Tensor, groups: ExpertGroups) -> bool:
    """CUDA rows that are not double, with triton, and no wish for determinism.

    The angle gradients are summed by atomic additions, whose order varies.
    """
    return (
        x.is_cuda
        and torch.float64 not in (x.dtype, angles.dtype)
        and not torch.are_deterministic_algorithms_enabled()
        and 2 <= (x.shape[1] & -x.shape[1]) <= MAX_FUSED
        and has_triton()
    )


def regular_part(d: int, stages: int) -> tuple[int, int]:
    """(power-of-two part of d, stages with a power-of-two stride).

    Example:
        >>> regular_part(768, 10), regular_part(512, 9), regular_part(512, 4)
        ((256, 8), (512, 9), (512, 4))
    """
    part = d & -d
    return part, min(part.bit_length() - 1, stages)


def rotate_cuda(x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
    """Rotate sorted rows by their expert's angles; same function as `kernels.rotation.rotate`.

    Args:
        x: (rows, d), float32, bfloat16 or float16; the maths is float32.
        angles: (experts, stages, pairs) float32.
        groups: Which expert each row belongs to.
        inverse: Apply the transpose.
    """
    regular = regular_part(x.shape[1], angles.shape[1])[1]
    dtype = x.dtype
    if inverse and regular < angles.shape[1]:
        x = irregular_stages(x.float(), angles, groups, regular, inverse).to(dtype)
    if regular:
        x = fused_rotation(x.contiguous(), angles.contiguous(), groups.counts, inverse)
    if not inverse and regular < angles.shape[1]:
        x = irregular_stages(x.float(), angles, groups, regular, inverse).to(dtype)
    return x


def _launch_shape(d: int, backward: bool) -> tuple[int, int]:
    """(rows a tile, warps a program): about 4096 numbers a tile, 16 to 32 a thread."""
    height = max(4096 // d, 1)
    numbers = height * d * (2 if backward else 1)
    return min(height, 64), min(max(numbers // (32 * 32), 1), 16)


@torch.library.custom_op("bfmoe::rotate_fused", mutates_args=())
def fused_rotation(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    """The regular stages of the rotation in one launch."""
    from lightning_bfmoe.kernels.triton_rotation import rotate_fwd_kernel

    rows, width = x.shape
    stages, pairs = angles.shape[1:]
    d, regular = regular_part(width, stages)
    height, warps = _launch_shape(d, backward=False)
    tiles = row_tiles(counts, rows, height)
    y = torch.empty_like(x)
    rotate_fwd_kernel[(tiles.expert.shape[0], width // d)](
        x, y, angles.cos(), angles.sin(), tiles.expert, tiles.row, tiles.end,
        WIDTH=width, D=d, STAGES=regular, TOTAL=stages, PAIRS=pairs, R=height, INVERSE=inverse,
        num_warps=warps,
    )  # fmt: skip
    return y


@fused_rotation.register_fake
def _(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bfmoe::rotate_fused_backward", mutates_args=())
def fused_rotation_backward(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients by the rows and by the angles, from the output alone."""
    from lightning_bfmoe.kernels.triton_rotation import rotate_bwd_kernel

    rows, width = y.shape
    stages, pairs = angles.shape[1:]
    d, regular = regular_part(width, stages)
    height, warps = _launch_shape(d, backward=True)
    tiles = row_tiles(counts, rows, height)
    dx, dangles = torch.empty_like(y), torch.zeros_like(angles)
    rotate_bwd_kernel[(tiles.expert.shape[0], width // d)](
        y, grad, dx, dx, dangles, angles.cos(), angles.sin(), tiles.expert, tiles.row, tiles.end,
        WIDTH=width, D=d, STAGES=regular, TOTAL=stages, PAIRS=pairs, R=height, INVERSE=inverse,
        KEEP_X=False, num_warps=warps,
    )  # fmt: skip
    return dx, dangles


@fused_rotation_backward.register_fake
def _(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(angles)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, angles, counts, inverse = inputs
    ctx.save_for_backward(output, angles, counts)
    ctx.inverse = inverse  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    y, angles, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dangles = fused_rotation_backward(
        y, grad.contiguous(), angles, counts, ctx.inverse  # type: ignore[attr-defined]
    )  # fmt: skip
    return dx, dangles, None, None


fused_rotation.register_autograd(_backward, setup_context=_setup)
