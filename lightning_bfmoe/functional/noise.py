"""Noise from a counter: the same for the same key and step, with no generator to carry about."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = 0xFFFFFFFF  # 32 bits


def counter_noise(
    counter: Int[Tensor, " 2"], rows: int, columns: int
) -> Float[Tensor, "rows columns"]:
    r"""Standard normal numbers that depend on (key, step, row, column) alone.

    .. math:: z = \Phi^{-1}(u) ,\qquad u = h(key, step, row, column) \in (0, 1)

    No generator moves, global or other: a repeated pass (activation checkpointing) and a resumed
    training get the same noise, on every device.

    Example:
        >>> noise = counter_noise(torch.tensor([7, 0]), 2, 3)
        >>> noise.shape, noise.equal(counter_noise(torch.tensor([7, 1]), 2, 3))
        (torch.Size([2, 3]), False)

    Args:
        counter: Key and step, int64, of which 32 bits each are used.
        rows: Rows (count).
        columns: Columns (count).

    Returns:
        float32, of 23 bits: no larger than 5.3 in magnitude.

    Source: the idea is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the
    hash is C. Wellons' lowbias32.
    """
    device = counter.device
    seed = _mix(_mix(counter[0] & _MASK) ^ (counter[1] & _MASK))
    row = _mix(seed ^ torch.arange(rows, device=device).unsqueeze(1))  # (rows, 1)
    column = _mix(_mix(seed ^ _MASK) ^ torch.arange(columns, device=device))  # (columns,)
    uniform = ((_mix(row ^ column) >> 9).to(torch.float32) + 0.5) * 2.0**-23  # all exact
    noise: Tensor = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
    return noise


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits, held in int64; the second factor minus 2^32, so that no product overflows."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _MASK
    return x ^ (x >> 16)
