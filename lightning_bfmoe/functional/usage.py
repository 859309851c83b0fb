"""How evenly the experts are used: entropy, worst overload and dead experts of a load."""

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lightning_bfmoe.errors import ShapeError


def load_entropy(
    load: Num[Tensor, "*layers experts"], normalized: bool = True
) -> Float[Tensor, "*layers"]:
    r"""Entropy of the load: how many experts are in effective use.

    .. math:: H = -\sum_i f_i \ln f_i ,\quad f_i = \frac{n_i}{\sum_j n_j} ,\qquad
       H_{norm} = \frac{H}{\ln N}

    Example:
        >>> load_entropy(torch.tensor([3, 3, 0, 0])).item()
        0.5

    Args:
        load: Tokens (or slots) that each expert received, n_i >= 0.
        normalized: Divide by ln N: 1 is even use, 0 is collapse (1 for a single expert). Otherwise
            in nats: exp(H) is the effective number of experts.

    Returns:
        float64; NaN where no expert received anything.

    Raises:
        ShapeError: No experts.

    Source: Shannon entropy of the routing shares; ours.
    """
    check_load(load)
    wide = load.to(torch.float64)
    share = wide / wide.sum(dim=-1, keepdim=True)
    entropy: Tensor = -torch.special.xlogy(share, share).sum(dim=-1)
    if not normalized:
        return entropy
    if load.shape[-1] == 1:
        return entropy + 1  # ln 1 = 0; the NaN of no load stays
    return entropy / math.log(load.shape[-1])


def max_violation(load: Num[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    r"""How far the fullest expert exceeds the mean: 0 is balance, N - 1 is collapse.

    .. math:: \mathrm{MaxVio} = \frac{\max_i n_i}{\frac{1}{N} \sum_i n_i} - 1

    Example:
        >>> max_violation(torch.tensor([6, 2, 0, 0])).item()
        2.0

    Returns:
        float64; NaN where no expert received anything.

    Raises:
        ShapeError: No experts.

    Source: Loss-free balancing, arXiv 2408.15664, eq. 4.
    """
    check_load(load)
    wide = load.to(torch.float64)
    return wide.amax(dim=-1) / wide.mean(dim=-1) - 1


def dead_experts(load: Num[Tensor, "*layers experts"]) -> Int[Tensor, "*layers"]:
    """How many experts received nothing.

    Example:
        >>> dead_experts(torch.tensor([6, 2, 0, 0])).item()
        2

    Raises:
        ShapeError: No experts.
    """
    check_load(load)
    return (load == 0).sum(dim=-1)


def check_load(load: Tensor) -> None:
    """Raise unless the last axis of `load` counts at least one expert."""
    if load.dim() == 0 or load.shape[-1] == 0:
        raise ShapeError(
            "a load has one number per expert, and at least one expert",
            got=f"shape {tuple(load.shape)}",
            fix="Use functional.expert_load(experts, num_experts).",
        )
