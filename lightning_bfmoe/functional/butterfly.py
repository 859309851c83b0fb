r"""Butterfly rotations: products of sparse Givens rotations, exactly orthogonal for every d >= 2.

One stage rotates disjoint pairs of coordinates,

.. math:: y_1 = \cos\theta\,x_1 - \sin\theta\,x_2,\qquad y_2 = \sin\theta\,x_1 + \cos\theta\,x_2 .

Which pairs? Think of the coordinates as a deck of cards. A stage rotates neighbours (slots 2j and
2j+1), then the deck is un-shuffled: even slots to the front, odd slots behind them. For d = 2^L
this is the paper's butterfly (strides 1, 2, 4, ..., d/2) and the deck is back in order after L
stages. For every other even d the same network still joins every input to every output in
ceil(log2 d) stages (the generalised shuffle-exchange network), so nothing is padded and no energy
is lost. With an odd d one coordinate sits out in each stage, and two more stages make the mixing
complete.

Pairs are given in natural coordinates, so zero angles are the identity at every d.
"""

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_bfmoe.errors import ShapeError


def num_pairs(d: int) -> int:
    """Pairs that one stage rotates: floor(d / 2)."""
    return d // 2


def num_stages(d: int) -> int:
    """Stages after which every output depends on every input: ceil(log2 d), two more for odd d.

    Example:
        >>> num_stages(512), num_stages(768), num_stages(5)
        (9, 10, 5)

    Raises:
        ShapeError: d < 2, which leaves nothing to rotate.
    """
    if d < 2:
        raise ShapeError("a butterfly needs d >= 2", got=f"d={d}", fix="Use a wider layer.")
    return (d - 1).bit_length() + 2 * (d % 2)


def check_stages(d: int, stages: int | None) -> int:
    """The number of stages to use: all for `None`, else the given count if it is in range."""
    full = num_stages(d)
    if stages is None:
        return full
    if not 1 <= stages <= full:
        raise ShapeError(
            f"a butterfly of d={d} has 1 to {full} stages",
            got=f"stages={stages}",
            fix=f"Use stages=None for all {full}.",
        )
    return stages


@functools.lru_cache(maxsize=256)
def _pairs_on_cpu(d: int, stages: int) -> tuple[Tensor, Tensor]:
    deck = torch.arange(d)
    first, second = [], []
    for _ in range(stages):
        left, right = deck[0 : 2 * num_pairs(d) : 2], deck[1 : 2 * num_pairs(d) : 2]
        low, high = torch.minimum(left, right), torch.maximum(left, right)
        order = torch.argsort(low)
        first.append(low[order])
        second.append(high[order])
        deck = torch.cat([deck[0::2], deck[1::2]])
    return torch.stack(first), torch.stack(second)


def stage_pairs(
    d: int, stages: int | None = None, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "stages pairs"], Int[Tensor, "stages pairs"]]:
    """The coordinates that each stage pairs, sorted by the smaller one.

    For d = 2^L stage s pairs j with j + 2^s, as in the paper.

    Example:
        >>> first, second = stage_pairs(4)
        >>> list(zip(first[1].tolist(), second[1].tolist()))
        [(0, 2), (1, 3)]

    Args:
        d: Width, at least 2.
        stages: How many stages; all when `None`.
        device: Where the index tensors shall live.

    Returns:
        Smaller and larger coordinate of every pair.

    Raises:
        ShapeError: d < 2, or more stages than the butterfly has.

    Source: powers of two arXiv 2601.13563; other widths ours.
    """
    first, second = _pairs_on_cpu(d, check_stages(d, stages))
    return first.to(device), second.to(device)


def apply_butterfly(
    x: Float[Tensor, "*batch d"],
    angles: Float[Tensor, "*batch_or_one stages pairs"],
    inverse: bool = False,
) -> Float[Tensor, "*batch d"]:
    r"""Rotate the last axis: B(angles) x, or its inverse B(angles)^T x.

    .. math:: B(\theta) = G_L(\theta_L) \cdots G_2(\theta_2)\,G_1(\theta_1),\qquad
       B(\theta)^T = B(\theta)^{-1} = G_1(-\theta_1) \cdots G_L(-\theta_L)

    Example:
        >>> quarter = torch.full((1, 1), math.pi / 2)
        >>> apply_butterfly(torch.tensor([1.0, 0.0]), quarter).round().abs().tolist()
        [0.0, 1.0]

    Args:
        x: Rows to rotate.
        angles: Radians; the same for all rows, or with leading axes that broadcast against x's
            (one set of angles a row).
        inverse: Undo the rotation: stages reversed, angles negated.

    Returns:
        The rotated rows, same shape and dtype as `x`.

    Raises:
        ShapeError: The angles do not have floor(d / 2) pairs, or too many stages.

    Source: arXiv 2601.13563, eq. of B(theta).
    """
    d, (stages, pairs) = x.shape[-1], angles.shape[-2:]
    check_angles(d, stages, pairs)
    first, second = stage_pairs(d, stages, x.device)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    for s in reversed(range(stages)) if inverse else range(stages):
        x = rotate_stage(x, cos[..., s, :], sin[..., s, :], first[s], second[s])
    return x


def rotate_stage(
    x: Float[Tensor, "*batch d"],
    cos: Float[Tensor, "*batch_or_one pairs"],
    sin: Float[Tensor, "*batch_or_one pairs"],
    first: Int[Tensor, " pairs"],
    second: Int[Tensor, " pairs"],
) -> Float[Tensor, "*batch d"]:
    """One stage of Givens rotations on the coordinate pairs (first, second); not in place."""
    x1, x2 = x[..., first], x[..., second]  # (..., pairs)
    out = x.expand(torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1]) + x.shape[-1:]).clone()
    out[..., first] = (cos * x1 - sin * x2).to(x.dtype)
    out[..., second] = (sin * x1 + cos * x2).to(x.dtype)
    return out


def check_angles(d: int, stages: int, pairs: int) -> None:
    """Raise unless angles of shape (..., stages, pairs) fit width d."""
    if d < 2:
        num_stages(d)  # raises
    if pairs != num_pairs(d) or not 1 <= stages <= num_stages(d):
        raise ShapeError(
            f"angles for d={d} have shape (..., 1 to {num_stages(d)} stages, {num_pairs(d)} pairs)",
            got=f"(..., {stages}, {pairs})",
            fix=f"Use torch.zeros({num_stages(d)}, {num_pairs(d)}) for the identity.",
        )


def butterfly_matrix(
    angles: Float[Tensor, "*batch stages pairs"], d: int
) -> Float[Tensor, "*batch d d"]:
    """The dense matrix of B(angles), d x d; for reading, testing and merging, never for speed.

    Example:
        >>> butterfly_matrix(torch.zeros(3, 4), 8).equal(torch.eye(8))
        True
    """
    eye = torch.eye(d, dtype=angles.dtype, device=angles.device)
    columns = apply_butterfly(eye.expand(*angles.shape[:-2], d, d), angles.unsqueeze(-3))
    return columns.transpose(-1, -2)


def hadamard_angles(
    d: int, stages: int | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "stages pairs"]:
    """All angles pi/4: for d = 2^L the Walsh-Hadamard matrix / sqrt(d), up to column signs."""
    return torch.full((check_stages(d, stages), num_pairs(d)), math.pi / 4, dtype=dtype)
