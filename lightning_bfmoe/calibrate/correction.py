r"""A low-rank correction beside a layer, in closed form: what it misses, regressed on its input.

All it takes is the moments of z = [h; x], hidden units and inputs of the same tokens, with the
wanted outputs y as targets: those of the error e = y - W h - b follow for any W.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.calibrate.orbit import centre_weight
from lightning_bfmoe.errors import CalibrationError
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE

RIDGES = (1e-3, 1e-2, 1e-1)
"""Shares of the mean variance that are tried as the ridge."""


class Missed(NamedTuple):
    """Moments of the error e = y - W h - b and of the input x."""

    mean_x: Tensor
    """(d,)."""
    mean: Tensor
    """E[e], (d_out,)."""
    c_xx: Tensor
    """(d, d)."""
    c_ex: Tensor
    """(d_out, d)."""
    square: float
    """E|e|^2."""
    variance: float
    """E|y - mean y|^2, for relative errors."""


def missed(weight: Tensor, bias: Tensor | None, moments: Moments) -> Missed:
    r"""What an output matrix misses, in moments.

    .. math:: C_{ex} = C_{yx} - W C_{hx} ,\qquad
       E|e|^2 = \mathrm{tr}(C_{yy} - 2 W C_{hy} + W C_{hh} W^T) + |\bar y - W \bar h - b|^2

    Args:
        weight: W, (d_out, d_ff).
        bias: b, (d_out,), or None.
        moments: Of [h; x], (d_ff + d), with targets y.

    Returns:
        Everything in double.
    """
    w, f = weight.detach().double(), weight.shape[1]
    c, cross = moments.covariance(), moments.cross()
    mean = moments.target_mean - w @ moments.mean[:f]
    mean = mean if bias is None else mean - bias.detach().double()
    variance = float(moments.target_variance().sum())
    explained = 2 * (w * cross[:, :f]).sum() - ((w @ c[:f, :f]) * w).sum()
    square = max(variance - float(explained), 0.0) + float(mean.square().sum())
    c_ex = cross[:, f:] - w @ c[:f, f:]
    return Missed(moments.mean[f:], mean, c[f:, f:], c_ex, square, variance)


def low_rank_correction(error: Missed, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""The best map of rank r from the input to the error: reduced-rank regression.

    With B the ridge regression of e on x and V the top r eigenvectors of
    :math:`B C_{xx} B^T`, it is :math:`V (V^T B)(x - \bar x)`. Components come in falling order of
    what they explain, so the first k are the best map of rank k. Each one's two vectors are scaled
    to one length, which serves half precision and training.

    Example:
        >>> x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = Moments(1 + 4, 3)
        >>> y = x[:, :1] @ torch.ones(1, 3).double()
        >>> moments.update(torch.cat([x[:, :1] * 0, x], dim=1), y)
        >>> error = missed(torch.zeros(3, 1), None, moments)
        >>> basis, _, left = low_rank_correction(error, rank=1, ridge=0.0)
        >>> (left @ basis)[0].round(decimals=9).abs().tolist()
        [1.0, 0.0, 0.0, 0.0]

    Args:
        error: Moments of e and x.
        rank: r, 1 to min(d, d_out).
        ridge: Share of the mean variance of x.

    Returns:
        U (r, d), c (r,) and V (d_out, r), in double: the correction is V (U x + c).

    Raises:
        CalibrationError: The rank is out of range.

    Source: reduced-rank regression (Izenman 1975); ridge, scaling and use ours.
    """
    most = min(error.c_ex.shape)
    if not 1 <= rank <= most:
        raise CalibrationError(
            f"the rank of a correction {error.c_ex.shape[1]} -> {error.c_ex.shape[0]} "
            f"lies in 1 to {most}",
            got=f"rank={rank}",
            fix=f"About d / 16 serves: rank={max(1, most // 16)}.",
        )
    c = error.c_xx
    level = ridge * c.diagonal().mean()
    damped = c + level * torch.eye(len(c), dtype=c.dtype, device=c.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not ridge:  # an input that never moves, or few tokens
        regression = error.c_ex @ torch.linalg.pinv(damped, hermitian=True)
    else:
        regression = torch.cholesky_solve(error.c_ex.T, lower).T  # B, (d_out, d)
    explained = regression @ c @ regression.T
    vectors = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors  # ascending
    left = vectors[:, -rank:].flip(1)  # (d_out, r)
    basis = left.T @ regression  # (r, d)
    length = basis.norm(dim=1).clamp(min=1e-30).sqrt()
    basis, left = basis / length.unsqueeze(1), left * length
    return basis, -basis @ error.mean_x, left


def errors_by_rank(error: Missed, basis: Tensor, offset: Tensor, left: Tensor) -> list[float]:
    r"""E|e - V_k (U_k x + c_k)|^2 over the variance of y, for the first k = 0 ... r components.

    With z = U x + c it is

    .. math:: E|e|^2 - 2\,\mathrm{tr}(V^T E[e z^T]) + \mathrm{tr}(V^T V E[z z^T])

    Args:
        error: Moments of e and x, of the tokens that judge.
        basis: U, (r, d).
        offset: c, (r,).
        left: V, (d_out, r).

    Returns:
        r + 1 numbers.
    """
    basis, offset, left = basis.double(), offset.double(), left.double()
    mean = basis @ error.mean_x + offset  # (r,)
    e_z = error.c_ex @ basis.T + torch.outer(error.mean, mean)  # (d_out, r)
    z_z = basis @ error.c_xx @ basis.T + torch.outer(mean, mean)  # (r, r)
    gained = 2 * (left * e_z).sum(dim=0)  # (r,)
    pairs = (left.T @ left) * z_z
    spent = pairs.tril().sum(dim=1) + pairs.tril(-1).sum(dim=1)  # by the component that comes last
    squares = error.square - torch.cumsum(gained - spent, dim=0)
    size = max(error.variance, 1e-300)
    return [error.square / size, *(squares.clamp(min=0) / size).tolist()]


@torch.no_grad()
def fit_correction_(layer: ButterflyMoE, fit: Moments, held: Moments) -> list[float]:
    """Fit a layer's correction to what its mean expert misses; zero where held-out tokens lose.

    Args:
        layer: Its experts are done; the correction is written.
        fit: Moments of `degraded_hidden` and inputs, side by side, with the block's outputs.
        held: The same of held-out tokens, which choose the ridge.

    Returns:
        Held-out errors by rank, see `errors_by_rank`.
    """
    correction, down = layer.correction, layer.experts.down
    assert correction is not None
    matrix = centre_weight(down) if isinstance(down, ButterflyLinear) else down.weight
    found, judge = (missed(matrix, down.bias, m) for m in (fit, held))
    trials = [low_rank_correction(found, correction.rank, ridge) for ridge in RIDGES]
    scores = [errors_by_rank(judge, *trial) for trial in trials]
    best = min(range(len(trials)), key=lambda i: scores[i][-1])
    basis, offset, left = trials[best]
    errors = scores[best]
    if errors[-1] >= errors[0]:
        left, errors = torch.zeros_like(left), errors[:1] * len(errors)
    correction.basis.copy_(basis)
    correction.offset.copy_(offset)
    correction.weight.copy_(left)
    return errors
