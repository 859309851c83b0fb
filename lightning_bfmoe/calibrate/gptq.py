r"""Ternary rounding that knows its inputs: GPTQ onto the grid {-alpha, 0, alpha}.

Rounding each weight to the nearest grid point is right for white inputs only. With the second
moment H = E[x x^T] of the real ones the output error of a row w is (w - q) H (w - q)^T, and an
error made in one column can be paid back by the columns that are still to be rounded.
"""

import torch
from torch import Tensor

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.ternary import check_finite, ternarize

_BLOCK = 128  # columns that are rounded before the rest of the matrix is told


def gptq_ternary(
    weight: Tensor,
    second_moment: Tensor,
    *,
    damping: float = 0.01,
    granularity: str = "row",
) -> tuple[Tensor, Tensor]:
    r"""Trits and scales of a matrix that make its output error under given inputs small.

    Columns are taken by falling H'_jj, with H' = H + damping * mean(diag H) I and U the upper
    Cholesky factor of the inverse of H'. Column j of all rows at once:

    .. math:: t_j = \mathrm{clip}(\mathrm{round}(w_j / \alpha), -1, 1) ,\quad
       e = (w_j - \alpha t_j) / U_{jj} ,\quad W_{:, j:} \mathrel{-}= e\,U_{j, j:}

    alpha starts as the exact least-squares scale of the row and ends as the best one for the trits
    that were found, :math:`\alpha = (w H' t) / (t H' t)`, with w the row as it was given.

    Example:
        >>> weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> trits, alpha = gptq_ternary(weight, torch.eye(8))
        >>> trits.shape, alpha.shape
        (torch.Size([4, 8]), torch.Size([4, 1]))

    Args:
        weight: (d_out, d_in).
        second_moment: H of the inputs, uncentred, (d_in, d_in).
        damping: Share of the mean diagonal that is added to it; raised tenfold, up to 1, until
            H' is positive definite in floating point.
        granularity: `row`, or `tensor` for one scale of the matrix.

    Returns:
        Trits (int8, (d_out, d_in)) and scales ((d_out, 1) or (1, 1), >= 0, in double).

    Raises:
        ShapeError: Shapes do not fit, or numbers are not finite.

    Source: GPTQ (arXiv 2210.17323) with act-order; the ternary grid and the refitted scale ours.
    """
    d_in = weight.shape[1]
    if tuple(second_moment.shape) != (d_in, d_in):
        raise ShapeError(
            f"the second moment of {d_in} inputs is ({d_in}, {d_in})",
            got=tuple(second_moment.shape),
            fix="Collect the moments of the inputs of this very matrix.",
        )
    check_finite(weight, "a weight that is rounded")
    check_finite(second_moment, "the second moment of the inputs")
    original = weight.detach().double()
    trits, alpha = ternarize(original, "lstsq", granularity)
    if not bool((second_moment.diagonal() > 0).any()):
        return trits, alpha  # nothing ever came in: plain least squares
    damped, upper, order = _factor(second_moment.detach().double(), damping)
    trits = _round_columns(original[:, order], alpha, upper)[:, torch.argsort(order)]
    return _refit_scale(original, trits, damped, granularity)


def _factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """H', the upper Cholesky factor of its inverse in the order of its columns, and the order."""
    level = h.diagonal().mean()
    while True:
        damped = h.clone()
        damped.diagonal().add_(damping * level)
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        lower, failed = torch.linalg.cholesky_ex(damped[order.unsqueeze(1), order])
        if not failed:
            lower = torch.cholesky_inverse(lower)  # one name, so that each matrix goes in time
            lower, failed = torch.linalg.cholesky_ex(lower, upper=True)
        if not failed:
            return damped, lower, order
        if damping >= 1:
            raise ShapeError(
                "a second moment is positive semi-definite",
                got="one that is indefinite even when its mean diagonal is added",
                fix="Use Moments.second(), or X^T X / n.",
            )
        damping = min(1.0, 10 * max(damping, 1e-4))


def _round_columns(weight: Tensor, alpha: Tensor, upper: Tensor) -> Tensor:
    """The trits of `weight`, its columns in the order of `upper`; blocks keep the updates cheap."""
    left = weight.T.contiguous()  # (d_in, d_out): a column of the weight is a contiguous row
    scale = alpha.squeeze(1).expand(weight.shape[0])  # (d_out,)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    trits = torch.zeros_like(left)
    for start in range(0, left.shape[0], _BLOCK):
        stop = min(start + _BLOCK, left.shape[0])
        errors = torch.zeros(stop - start, left.shape[1], dtype=left.dtype, device=left.device)
        for j in range(start, stop):
            trits[j] = (left[j] / divisor).round_().clamp_(-1, 1)
            errors[j - start] = (left[j] - scale * trits[j]) / upper[j, j]
            left[j:stop].addr_(upper[j, j:stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return trits.T.to(torch.int8)


def _refit_scale(
    weight: Tensor, trits: Tensor, h: Tensor, granularity: str
) -> tuple[Tensor, Tensor]:
    """The scales that are best for given trits; a negative one turns the trits of its row."""
    t = trits.double()
    th = t @ h  # (d_out, d_in)
    top = (th * weight).sum(dim=1, keepdim=True)  # (d_out, 1)
    bottom = (th * t).sum(dim=1, keepdim=True)
    if granularity == "tensor":
        top, bottom = top.sum(dim=0, keepdim=True), bottom.sum(dim=0, keepdim=True)
    alpha = torch.where(bottom > 0, top / bottom.clamp(min=1e-300), torch.zeros_like(top))
    return torch.where(alpha < 0, -trits, trits), alpha.abs()
