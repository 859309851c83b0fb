r"""Streaming means and second moments: all that calibration remembers of the activations.

Batches are merged by the pairwise update of Chan, Golub and LeVeque: each is centred by its own
mean before it is multiplied, and sums are kept in double. So a large common offset costs no digits,
no activation is stored, and memory depends on the widths only.
"""

import torch
from torch import Tensor

from lightning_bfmoe.errors import CalibrationError

_ROWS = 4096  # rows that are multiplied at once


class Moments:
    r"""Mean and covariance of rows x, and their covariance with targets y, over any stream.

    With n rows so far and m new ones, delta the difference of their means:

    .. math:: S \leftarrow S + S_{new} + \frac{n m}{n + m}\,\delta\,\delta^T ,\qquad C = S / n

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.mean.tolist(), moments.covariance().tolist()
        ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])

    Args:
        d: Width of x.
        d_target: Width of y; 0 without targets.
        name: Of the layer, for messages.
        dtype: In which sums are kept; float32 halves the memory of a set that only judges.
        device: Where they are kept.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances (1979), eq. 2.1.
    """

    def __init__(
        self,
        d: int,
        d_target: int = 0,
        *,
        name: str = "",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        self.d, self.d_target, self.name, self.count = d, d_target, name, 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)  # (d,)
        self.target_mean = torch.zeros(d_target, dtype=torch.float64, device=device)  # (d_target,)
        self._sum = torch.zeros(d, d, dtype=dtype, device=device)  # (d, d), centred
        self._cross = torch.zeros(d_target, d, dtype=dtype, device=device)  # (d_target, d), centred
        self._target = torch.zeros(d_target, dtype=torch.float64, device=device)  # centred squares

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: (rows, d), any floating dtype; products are formed in float32 or wider.
            y: (rows, d_target) when there are targets.

        Raises:
            CalibrationError: NaN or infinite numbers.
        """
        for part, rows in (("input", x), ("output", y)):
            if rows is not None and not bool(torch.isfinite(rows).all()):
                raise CalibrationError(
                    "activations that calibrate a layer are finite numbers",
                    got=f"{int((~torch.isfinite(rows)).sum())} NaN or infinite of {rows.numel()} "
                    f"in the {part} of {self.name or 'a layer'}",
                    fix="Find the batch and layer they come from: run the model on it in float32, "
                    "or leave padded rows out with mask_fn.",
                )
        ys = [None] * len(x.split(_ROWS)) if y is None else y.split(_ROWS)
        for chunk, target in zip(x.split(_ROWS), ys, strict=True):
            if len(chunk):
                self._merge(_wide(chunk), None if target is None else _wide(target))

    def _merge(self, x: Tensor, y: Tensor | None) -> None:
        total = self.count + len(x)
        weight = self.count * len(x) / total
        mean = x.double().mean(dim=0)
        delta = mean - self.mean
        x = x - mean.to(x.dtype)
        self._sum += x.T @ x
        self._sum.addr_(delta.to(self._sum.dtype), delta.to(self._sum.dtype), alpha=weight)
        if y is not None:
            target = y.double().mean(dim=0)
            shift = target - self.target_mean
            y = y - target.to(y.dtype)
            self._cross += y.T @ x
            self._cross.addr_(shift.to(self._sum.dtype), delta.to(self._sum.dtype), alpha=weight)
            self._target += y.double().square().sum(dim=0) + weight * shift.square()
            self.target_mean += shift * len(x) / total
        self.mean += delta * len(x) / total
        self.count = total

    def head(self, d: int) -> "Moments":
        """The moments of the first d coordinates, a view of these.

        Example:
            >>> moments = Moments(3, 1)
            >>> moments.update(torch.eye(3), torch.ones(3, 1))
            >>> moments.head(2).covariance().shape, moments.head(2).cross().shape
            (torch.Size([2, 2]), torch.Size([1, 2]))
        """
        part = Moments(0, 0, name=self.name)
        part.d, part.d_target, part.count = d, self.d_target, self.count
        part.mean, part.target_mean = self.mean[:d], self.target_mean
        part._sum, part._cross, part._target = self._sum[:d, :d], self._cross[:, :d], self._target
        return part

    def covariance(self) -> Tensor:
        """C = E[(x - mean)(x - mean)^T], (d, d) in double."""
        return self._sum.double() / max(self.count, 1)

    def second(self) -> Tensor:
        """H = E[x x^T], (d, d) in double."""
        return self.covariance().addr_(self.mean, self.mean)

    def cross(self) -> Tensor:
        """E[(y - mean y)(x - mean x)^T], (d_target, d) in double."""
        return self._cross.double() / max(self.count, 1)

    def target_variance(self) -> Tensor:
        """E[(y - mean y)^2], (d_target,) in double."""
        return self._target / max(self.count, 1)

    def dead(self) -> int:
        """Coordinates of x that never moved (count)."""
        return int((self._sum.diagonal() <= 0).sum())

    def output_error(self, weight: Tensor, bias: Tensor) -> float:
        r"""E|y - W x - b|^2 over the variance of y, from the moments alone.

        .. math:: \mathrm{tr}(C_{yy}) - 2\,\mathrm{tr}(W C_{xy}) + \mathrm{tr}(W C_{xx} W^T)
           + |\bar y - W \bar x - b|^2

        Args:
            weight: (d_target, d).
            bias: (d_target,).

        Returns:
            0 for a perfect map, 1 for the mean of y; infinity when y is constant and missed.
        """
        weight, bias = weight.double(), bias.double()
        explained = (
            2 * (weight * self.cross()).sum() - ((weight @ self.covariance()) * weight).sum()
        )
        miss = (self.target_mean - weight @ self.mean - bias).square().sum()
        variance = self.target_variance().sum()
        error = float((variance - explained + miss).clamp(min=0))
        return error / float(variance) if variance > 0 else (float("inf") if error else 0.0)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
