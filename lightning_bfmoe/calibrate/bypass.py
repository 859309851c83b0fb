r"""Fitted linear bypasses: what of a submodule is a linear map of its input, of any rank.

All is done on moments in which a token counts by its weight, so that the error that is minimised is
the one that a selection goes by: :math:`E_t[w_t |y_t - \hat y_t|^2]` with
:math:`w_t = 1 / |r_t + y_t|^2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.errors import CalibrationError


class WeightedMoments:
    r"""Streamed moments of (x, y) with a weight for each token, in double.

    Example:
        >>> moments = WeightedMoments(1, 1)
        >>> x = torch.tensor([[0.0], [4.0]])
        >>> moments.update(x, 2 * x, torch.tensor([3.0, 1.0]))
        >>> found = moments.statistics()
        >>> round(found.mean_x.item(), 6), round(found.c_yx.item(), 6)
        (1.0, 6.0)

    Args:
        d_in: Width of x.
        d_out: Width of y.
        device: Where sums are kept.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device | str | None = None) -> None:
        self.d_in, self.d_out, self.count = d_in, d_out, 0
        size = d_in + 1 + d_out
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens: x (tokens, d_in), y (tokens, d_out), weight (tokens,)."""
        for a, b, w in zip(x.split(2048), y.split(2048), weight.split(2048), strict=True):
            ones = torch.ones(len(a), 1, dtype=torch.float64, device=a.device)
            z = torch.cat([a.double(), ones, b.double()], dim=1) * w.double().sqrt().unsqueeze(1)
            self._sum += z.T @ z
            self.count += len(a)

    def statistics(self) -> "Statistics":
        """Weighted means and covariances."""
        d = self.d_in
        total = self._sum[d, d].clamp(min=1e-300)
        mean = self._sum[d] / total  # (d_in + 1 + d_out,)
        c = self._sum / total - torch.outer(mean, mean)
        return Statistics(
            mean[:d], mean[d + 1 :], c[:d, :d], c[d + 1 :, :d], c[d + 1 :, d + 1 :],
            float(total) / max(self.count, 1),
        )  # fmt: skip


class Statistics(NamedTuple):
    """Weighted means and covariances of (x, y)."""

    mean_x: Tensor
    mean_y: Tensor
    c_xx: Tensor
    c_yx: Tensor
    c_yy: Tensor
    mean_weight: float


@dataclass(frozen=True)
class Bypass:
    """y = left right x + bias; no factors for a constant."""

    left: Tensor | None
    """(d_out, r)."""
    right: Tensor | None
    """(r, d_in)."""
    bias: Tensor
    """(d_out,)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (tokens, d_in) to (tokens, d_out)."""
        y = self.bias.to(x.dtype).expand(len(x), -1)
        if self.left is None or self.right is None:
            return y
        return y + (x @ self.right.T.to(x.dtype)) @ self.left.T.to(x.dtype)


def linear_map(s: Statistics, ridge: float = 1e-3) -> Tensor:
    r"""W = C_yx (C_xx + lambda I)^-1, (d_out, d_in), lambda = ridge * mean(diag C_xx).

    Source: NBL (arXiv 2505.21077), its linear minimum-mean-square-error estimator; the ridge ours.
    """
    level = ridge * s.c_xx.diagonal().mean()
    damped = s.c_xx + level * torch.eye(len(s.c_xx), dtype=s.c_xx.dtype, device=s.c_xx.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return s.c_yx @ torch.linalg.pinv(damped, hermitian=True)
    return torch.cholesky_solve(s.c_yx.T, lower).T


def fit_bypass(s: Statistics, rank: int, ridge: float = 1e-3) -> Bypass:
    r"""The best map of rank r with a constant: reduced-rank regression.

    With W the full regression and V the top r eigenvectors of :math:`W C_{xx} W^T`, the map is
    :math:`V (V^T W)`.

    Args:
        s: Of the submodule's inputs and outputs.
        rank: r; 0 for the mean output.
        ridge: Share of the mean variance.

    Raises:
        CalibrationError: The rank is out of range.

    Source: reduced-rank regression (Izenman 1975); its use for submodules SubFit-style
    (arXiv 2606.02559).
    """
    most = min(len(s.mean_x), len(s.mean_y))
    if not 0 <= rank <= most:
        raise CalibrationError(
            f"the rank of a bypass lies in 0 to {most}", got=f"rank={rank}", fix="Lower it."
        )
    if rank == 0:
        return Bypass(None, None, s.mean_y)
    full = linear_map(s, ridge)
    left = _top(full @ s.c_xx @ full.T, rank)  # (d_out, r)
    right = left.T @ full
    return Bypass(left, right, s.mean_y - left @ (right @ s.mean_x))


def shared_basis(several: Sequence[Statistics], rank: int, ridge: float = 1e-3) -> Tensor:
    r"""One U, (r, d_in), that serves the inputs of several submodules.

    Exact where all have one input covariance C: the rows span the best common subspace of the
    stacked regressions,

    .. math:: U = P^T C^{-1/2} ,\qquad P = \text{top left singular vectors of }
       C^{-1/2}\,[C_{x y_1}, \dots, C_{x y_L}]

    Otherwise C is their mean weighted by `mean_weight`, and `fit_on_basis` is still exact given U.

    Args:
        several: Of the submodules, in one width.
        rank: r, at least 1.
        ridge: Share of the mean variance.

    Source: ours, for the basis that SubFit's feed-forward bypasses share.
    """
    c = sum(s.c_xx * s.mean_weight for s in several) / sum(s.mean_weight for s in several)
    assert isinstance(c, Tensor)
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ torch.diag(values.clamp(min=1e-300).rsqrt()) @ vectors.T  # C^-1/2
    gram = torch.zeros_like(c)
    for s in several:
        half = root @ s.c_yx.T  # (d_in, d_out)
        gram += s.mean_weight * half @ half.T
    return _top(gram, rank).T @ root


def fit_on_basis(s: Statistics, basis: Tensor, ridge: float = 1e-3) -> Bypass:
    r"""The best map through a given U: :math:`B = C_{yx} U^T (U C_{xx} U^T + \lambda I)^{-1}`."""
    c = basis @ s.c_xx @ basis.T
    level = ridge * c.diagonal().mean()
    eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
    left = torch.linalg.solve(c + level * eye, basis @ s.c_yx.T).T  # (d_out, r)
    return Bypass(left, basis, s.mean_y - left @ (basis @ s.mean_x))


def linear_error(s: Statistics, ridge: float = 1e-3) -> float:
    r"""What the full linear map misses: :math:`E|y - Wx - b|^2` over the variance of y."""
    w = linear_map(s, ridge)
    missed = s.c_yy.trace() - 2 * (w * s.c_yx).sum() + ((w @ s.c_xx) * w).sum()
    return float(missed.clamp(min=0) / s.c_yy.trace().clamp(min=1e-300))


def canonical_bound(s: Statistics, ridge: float = 1e-6) -> float:
    r"""NBL's bound on the error of a linear map, over tr(C_{y+y+}), with y+ = y + x.

    .. math:: \mathrm{tr}(C_{y^+ y^+}) \sum_i (1 - \rho_i^2) ,\qquad
       \rho = \text{singular values of } C_{y^+ y^+}^{-1/2} C_{y^+ x} C_{xx}^{-1/2}

    Args:
        s: Of inputs and outputs of one width.
        ridge: Share of the mean variance, for the roots.

    Source: NBL (arXiv 2505.21077), its canonical-correlation bound.
    """
    plus = s.c_yy + s.c_yx + s.c_yx.T + s.c_xx
    cross = s.c_yx + s.c_xx
    rho = torch.linalg.svdvals(_inverse_root(plus, ridge) @ cross @ _inverse_root(s.c_xx, ridge))
    return float((1 - rho.clamp(max=1).square()).sum())


def merged_map(m: Tensor, c_mm: Tensor, c_tm: Tensor, ridge: float = 1e-3) -> Tensor:
    r"""ReplaceMe-like: the output matrix that also stands for the layers cut behind it.

    With M the outputs of a feed-forward block and T = L_{i+n} + M - L_i what they should be when
    the layers i + 1 to i + n are gone, A = argmin |M A - T|^2 is merged into the output matrix:

    .. math:: W_{down} \leftarrow A^T W_{down} ,\qquad A^T = C_{tm} (C_{mm} + \lambda I)^{-1}

    Args:
        m: W_down, (d_out, d_ff).
        c_mm: E[M M^T], (d_out, d_out), uncentred as there.
        c_tm: E[T M^T], (d_out, d_out).
        ridge: Share of the mean of the diagonal.

    Returns:
        The new matrix, (d_out, d_ff), in double.

    Source: ReplaceMe (arXiv 2505.02819), least-squares variant.
    """
    c = c_mm.double()
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    return torch.linalg.solve(c, c_tm.double().T).T @ m.double()


def _top(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues, as columns."""
    vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2).eigenvectors
    return vectors[:, -rank:].flip(1)


def _inverse_root(c: Tensor, ridge: float) -> Tensor:
    level = ridge * c.diagonal().mean()
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    return vectors @ torch.diag((values.clamp(min=0) + level).rsqrt()) @ vectors.T
