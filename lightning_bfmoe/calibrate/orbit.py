r"""Where an orbit stands: the rotation that all experts of a matrix share, and what is left of W.

Expert i has angles base + noise_i. Noise is centred over the experts, so that the base is exactly
their mean and a matrix that is rounded in the basis of the base is right for the mean expert.
"""

import math

import torch
from torch import Tensor

from lightning_bfmoe.functional.routing import group_by_expert
from lightning_bfmoe.kernels import rotate
from lightning_bfmoe.layers import ButterflyLinear
from lightning_bfmoe.layers.rotation import Rotation

BASES = {"identity": 0.0, "hadamard": math.pi / 4}
"""Angles of the input rotation that are tried (radians)."""


def base_angles(rotation: Rotation, angle: float) -> Tensor:
    """One set of equal angles for a rotation's shape, (stages, pairs) in double."""
    return torch.full(
        rotation.angles.shape[1:], angle, dtype=torch.float64, device=rotation.angles.device
    )


@torch.no_grad()
def place_orbit_(rotation: Rotation, angle: float, noise: float | None = None) -> None:
    """Move all experts' angles so that their mean is `angle`; what differs between them stays.

    Args:
        rotation: Changed in place.
        angle: Of the base (radians).
        noise: Standard deviation to which the experts' differences are scaled; None keeps them.
    """
    angles = rotation.angles.double()
    spread = angles - angles.mean(dim=0, keepdim=True)  # (experts, stages, pairs)
    if noise is not None:
        std = spread.square().mean().sqrt()
        spread = spread * (noise / std) if std > 0 else spread
    rotation.angles.copy_(angle + spread)


def into_basis(rows: Tensor, angles: Tensor) -> Tensor:
    """B(angles)^T on each row: what a row of weights is to inputs that were rotated likewise."""
    return _rotate(rows, angles, inverse=True)


def out_of_basis(rows: Tensor, angles: Tensor) -> Tensor:
    """The inverse of `into_basis`."""
    return _rotate(rows, angles, inverse=False)


def moment_in_basis(second_moment: Tensor, angles: Tensor) -> Tensor:
    """B^T H B: the second moment of rotated inputs."""
    half = into_basis(second_moment, angles)  # H B: B^T on the rows of H
    return into_basis(half.T, angles)


def _rotate(rows: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    """One rotation on all rows, through the fast kernel: all belong to one expert."""
    one = group_by_expert(torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device), 1)
    return rotate(rows.contiguous(), angles.unsqueeze(0), one, inverse)


@torch.no_grad()
def centre_weight(linear: ButterflyLinear) -> Tensor:
    """The dense matrix of the mean expert, (d_out, d_in), at the present lambda."""
    theta, phi = (r.angles.double().mean(dim=0) for r in (linear.rotate_in, linear.rotate_out))
    weight = out_of_basis(linear.substrate.weight().double(), theta)
    weight = out_of_basis(weight.T, phi).T
    if linear.gain_in is not None and linear.gain_out is not None:
        gains = linear.gain_out.mean(dim=0).unsqueeze(1), linear.gain_in.mean(dim=0)
        weight = gains[0].double() * weight * gains[1].double()
    return weight.to(linear.rotate_in.angles.dtype)
