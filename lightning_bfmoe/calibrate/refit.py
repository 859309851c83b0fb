r"""Closed forms for the output matrix: refit on degraded hidden units.

Once up and gate are ternary the hidden units are not what the trained output matrix expects. The
matrix that serves them best is a regression, and needs their moments only.
"""

import torch
from torch import Tensor

from lightning_bfmoe.calibrate.moments import Moments

RIDGES = (3e-3, 3e-2, 3e-1, 1.0)
"""Shares of the mean variance that are tried as the ridge."""


def refit_output(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    r"""The output matrix for the hidden units that there are, drawn towards the one that was.

    .. math:: W^* = W + (C_{yh} - W C_{hh})(C_{hh} + \lambda I)^{-1} ,\qquad
       \lambda = \texttt{ridge} \cdot \mathrm{mean}(\mathrm{diag}\,C_{hh})

    It minimises E|y - W* h - b|^2 + lambda |W* - W|^2 over W* and b.

    Example:
        >>> h = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = Moments(3, 2)
        >>> moments.update(h, h[:, :2])
        >>> refit_output(torch.zeros(2, 3), moments, 0.0).round(decimals=9).abs().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    Args:
        weight: W, (d_out, d_ff).
        moments: Of hidden units h with the wanted outputs y as targets.
        ridge: Relative strength of the pull towards W.

    Returns:
        W*, (d_out, d_ff) in double. A hidden unit that never moved keeps its column.

    Source: ridge regression; ReplaceMe (arXiv 2505.02819) merges such a map into W_down; the pull
    towards W ours.
    """
    w, c = weight.detach().double(), moments.covariance()
    level = ridge * c.diagonal().mean()
    alive = c.diagonal() > 0
    if not bool(alive.any()):
        return w
    c = c[alive][:, alive]
    damped = c + level * torch.eye(len(c), dtype=c.dtype, device=c.device)
    miss = moments.cross()[:, alive] - w[:, alive] @ c
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not ridge:  # without a ridge moments of few tokens are singular
        step = torch.linalg.pinv(damped, hermitian=True) @ miss.T
    else:
        step = torch.cholesky_solve(miss.T, lower)
    out = w.clone()
    out[:, alive] += step.T
    return out


def choose_refit(
    weight: Tensor, fit: Moments, held: Moments, ridges: tuple[float, ...] = RIDGES
) -> tuple[Tensor, float | None]:
    """The refitted matrix, or the given one, that does best on held-out moments before rounding.

    Args:
        weight: W, (d_out, d_ff).
        fit: Moments that it is fitted to.
        held: Moments of other tokens, which judge.
        ridges: Strengths to try.

    Returns:
        The matrix, and its ridge; None when the given one was best.
    """
    trials: list[tuple[Tensor, float | None]] = [(weight.double(), None)]
    trials += [(refit_output(weight, fit, ridge), ridge) for ridge in ridges]
    errors = [held.output_error(w, best_bias(w, fit)) for w, _ in trials]
    return trials[errors.index(min(errors))]


def best_bias(weight: Tensor, moments: Moments) -> Tensor:
    r"""mean(y) - W mean(h): the bias with which the mean output is right."""
    return moments.target_mean - weight.double() @ moments.mean
