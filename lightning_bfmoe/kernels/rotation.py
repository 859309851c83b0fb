"""The op "rotate rows by their expert": one entry, several implementations, fp32 maths inside."""

import torch
from torch import Tensor

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.butterfly import apply_butterfly, check_angles
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.blocks import rotate_blocks
from lightning_bfmoe.kernels.cpu import rotate_cpu, suits_cpu
from lightning_bfmoe.kernels.cuda import missing_triton, rotate_cuda, suits_cuda
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.library import missing_cpu


def rotate(x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
    r"""Rotate each row by the angles of its expert: row r becomes B(angles[expert_r]) x_r.

    Args:
        x: Rows sorted by expert, (rows, d), any floating dtype.
        angles: Radians, (experts, stages, pairs).
        groups: Which expert each row belongs to (`functional.group_by_expert`).
        inverse: Apply B^T instead.

    Returns:
        (rows, d) in the dtype of `x`; sines, products and sums are formed in float32, or in
        float64 for double input.

    Raises:
        ShapeError: Rows, experts or pairs do not fit one another.
    """
    if x.dim() != 2 or x.shape[0] != groups.expert.shape[0]:
        raise ShapeError(
            "rotate takes one row per entry of groups.expert, as a (rows, d) matrix",
            got=f"x of shape {tuple(x.shape)}, {groups.expert.shape[0]} entries",
            fix="Call functional.dispatch(x, groups, k) first.",
        )
    if angles.dim() != 3 or angles.shape[0] != groups.num_experts:
        raise ShapeError(
            "angles have shape (experts, stages, pairs)",
            got=f"{tuple(angles.shape)} for {groups.num_experts} experts",
            fix="Stack the angles of all experts in one tensor.",
        )
    check_angles(x.shape[1], angles.shape[1], angles.shape[2])
    if x.shape[0] == 0:
        return x + 0 * angles.sum().to(x.dtype)  # no rows, yet every angle has a (zero) gradient
    wide = torch.float64 if torch.float64 in (x.dtype, angles.dtype) else torch.float32
    kernel = choose("rotate", x, angles, groups)
    angles = angles if angles.dtype == wide else angles.to(wide)
    if kernel.widens:  # an op of its own, which autocast does not touch
        return kernel.run(x, angles, groups, inverse)
    with torch.autocast(x.device.type, enabled=False):
        return kernel.run(x.to(wide), angles, groups, inverse).to(x.dtype)


def rotate_reference(
    x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False
) -> Tensor:
    """The definition: gather every row's own angles and apply the stages one by one."""
    return apply_butterfly(x, angles[groups.expert], inverse)


register(
    Kernel("rotate", "reference", rotate_reference, lambda *_: True, "stage by stage; few rows")
)
register(
    Kernel(
        "rotate",
        "blocks",
        rotate_blocks,
        lambda x, angles, groups: x.shape[0] > max(16, 2 * groups.num_experts),
        "batched matrix products of block factors; many rows",
    )
)
register(
    Kernel(
        "rotate",
        "triton",
        rotate_cuda,
        suits_cuda,
        "fused stages in one launch; CUDA with triton, d up to 8192 (its power-of-two part)",
        missing=missing_triton,
        widens=True,
    )
)
register(
    Kernel(
        "rotate",
        "cpu",
        rotate_cpu,
        suits_cpu,
        "compiled, all stages in one pass; CPU, any width and number of rows",
        missing=missing_cpu,
    )
)
