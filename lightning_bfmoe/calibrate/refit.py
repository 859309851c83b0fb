r"""Closed forms for the output matrix: refit on degraded hidden units, and a low-rank correction.

Once up and gate are ternary the hidden units are not what the trained output matrix expects. The
matrix that serves them best is a regression, and needs their moments only.
"""

import torch
from torch import Tensor

from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.errors import CalibrationError

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


def low_rank_correction(
    weight: Tensor, moments: Moments, rank: int, ridge: float = 1e-2
) -> tuple[Tensor, Tensor]:
    r"""The best rank-r map from the hidden units to what an output matrix still misses.

    With B the ridge regression of the residual e = y - W h on h, and V the top eigenvectors of
    B C_hh B^T, the correction of a row h is V (V^T B) h (reduced-rank regression).

    Example:
        >>> h = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = Moments(4, 3)
        >>> moments.update(h, h[:, :1] @ torch.ones(1, 3).double())
        >>> left, right = low_rank_correction(torch.zeros(3, 4), moments, rank=1, ridge=0.0)
        >>> left.shape, right.shape, (left @ right)[0].round(decimals=9).abs().tolist()
        (torch.Size([3, 1]), torch.Size([1, 4]), [1.0, 0.0, 0.0, 0.0])

    Args:
        weight: The (ternary) output matrix, (d_out, d_ff).
        moments: Of hidden units with the wanted outputs as targets.
        rank: r, 1 to d_out.
        ridge: Share of the mean variance.

    Returns:
        Factors (d_out, r) and (r, d_ff), in double; W + left @ right is the corrected matrix.

    Raises:
        CalibrationError: The rank is out of range.

    Source: reduced-rank regression (Izenman 1975); ridge and use ours.
    """
    d_out = weight.shape[0]
    if not 1 <= rank <= d_out:
        raise CalibrationError(
            f"the rank of a correction of {d_out} outputs lies in 1 to {d_out}",
            got=f"rank={rank}",
            fix=f"About d / 16 serves: rank={max(1, d_out // 16)}.",
        )
    regression = refit_output(weight, moments, ridge) - weight.double()  # B, (d_out, d_ff)
    explained = regression @ moments.covariance() @ regression.T  # (d_out, d_out)
    vectors = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors  # ascending
    left = vectors[:, -rank:].flip(1)  # (d_out, r)
    return left, left.T @ regression
