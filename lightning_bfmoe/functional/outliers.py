r"""Outlier measures of activations, from one batch of rows or from a stream of them.

Everything is computed from a vector of twelve float64 *moments*: the count and the mean of all
numbers, sums, and one maximum. Moments of two parts merge into the moments of the whole
(`merge_moments`), so batches, micro-batches, ranks and machines add up to what one pass over all
the data gives, up to float64 rounding. Powers are summed about the mean, so a large mean cancels
nothing.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional.activation_quant import round_rows
from lightning_bfmoe.functional.ternary import check_finite

MOMENTS = (
    "values", "mean", "central2", "central3", "central4", "energy",
    "rows", "beyond", "incoherence", "snr_int8", "snr_int4", "peak",
)  # fmt: skip
"""What each moment is: the count and the mean of all numbers, sums of their powers about the mean,
the sum of their squares; the count of rows that are not all zero and sums over them; last the
largest magnitude."""

_SIGMAS = 6.0
_EXACT = 2.0**-48  # noise below this share of the signal counts as this: at most 144.5 dB
_CACHED = 1 << 15  # values in a block that fits a CPU cache: several times faster than one pass


def outlier_moments(x: Float[Tensor, "rows d"]) -> Float[Tensor, " moments"]:
    """The mergeable moments of a batch of rows, without gradient.

    Example:
        >>> outlier_moments(torch.tensor([[3.0, 5.0], [0.0, 0.0]]))[:7].tolist()
        [4.0, 2.0, 18.0, 12.0, 114.0, 34.0, 1.0]

    Args:
        x: Activations, one row per token; any floating dtype.

    Returns:
        float64, in the order of `MOMENTS` (float32 on devices without float64). NaN where `x` has
        NaN; zeros for no rows.

    Source: ours.
    """
    rows = x.detach()
    if rows.numel() == 0:
        return empty_moments(x.device)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _moments(rows)
    blocks = rows.split(max(1, _CACHED // rows.shape[1]))
    return merge_moments(torch.stack([_moments(block) for block in blocks]))


def _moments(rows: Tensor) -> Tensor:
    wide = rows.to(_wide(rows.device))  # (rows, d)
    square = wide * wide
    mean, energy = wide.mean(dim=1), square.sum(dim=1)  # (rows,)
    peak = rows.abs().amax(dim=1).to(wide.dtype)
    overall = mean.mean()
    deviation = (wide - overall).flatten()
    squared = deviation * deviation
    spread = (energy / wide.shape[1] - mean * mean).clamp(min=0).sqrt()
    far = (wide - mean.unsqueeze(1)).abs_() > _SIGMAS * spread.unsqueeze(1)
    beyond = torch.count_nonzero(far).to(wide.dtype) / wide.shape[1]  # none in a row of zeros
    live = peak != 0  # NaN is live, so that it stays visible
    ratio = peak * math.sqrt(wide.shape[1]) / energy.sqrt()
    return torch.stack(
        [
            torch.full_like(peak[0], wide.numel()),
            overall,
            torch.dot(deviation, deviation),
            torch.dot(squared, deviation),
            torch.dot(squared, squared),
            energy.sum(),
            live.sum().to(wide.dtype),
            beyond + 0 * energy.sum(),  # a comparison would swallow NaN
            ratio.where(live, 0).sum(),
            _row_snr(rows, energy, 8).where(live, 0).sum(),
            _row_snr(rows, energy, 4).where(live, 0).sum(),
            peak.amax(),
        ]
    )


def _row_snr(rows: Tensor, energy: Tensor, bits: int) -> Tensor:
    """Signal-to-noise ratio of each row (dB); NaN for a row of zeros."""
    error = round_rows(rows, bits) - rows
    # squares of float32 are taken in float64, where they neither overflow nor vanish
    noise = torch.linalg.vector_norm(error, dim=1, dtype=energy.dtype).square()
    return 10 * torch.log10(energy / torch.maximum(noise, energy * _EXACT))


def merge_moments(
    parts: Float[Tensor, "parts *sites moments"],
) -> Float[Tensor, "*sites moments"]:
    r"""Moments of the whole from those of its parts.

    Sums add up, the maximum is the largest, and sums of powers move to the new mean:

    .. math:: \bar x = \frac{\sum_p n_p \bar x_p}{\sum_p n_p} ,\qquad
       C_4 = \sum_p C_{4,p} + 4 \delta_p C_{3,p} + 6 \delta_p^2 C_{2,p} + n_p \delta_p^4 ,\qquad
       \delta_p = \bar x_p - \bar x

    and likewise C_3 and C_2.

    Example:
        >>> a, b = torch.randn(5, 8), torch.randn(3, 8)
        >>> merged = merge_moments(torch.stack([outlier_moments(a), outlier_moments(b)]))
        >>> torch.allclose(merged, outlier_moments(torch.cat([a, b])))
        True

    Source: Pebay, "Formulas for robust, one-pass parallel computation of covariances and
    arbitrary-order statistical moments" (Sandia, SAND2008-6212).
    """
    n, mean, c2, c3, c4 = parts[..., :5].unbind(dim=-1)  # (parts, *sites)
    count = n.sum(dim=0)
    share = n / count.clamp(min=1)
    # from the first mean, so that nearly equal means keep their digits
    whole = mean[0] + (share * (mean - mean[0])).sum(dim=0)
    d = mean - whole
    central = [
        (c2 + n * d**2).sum(dim=0),
        (c3 + 3 * d * c2 + n * d**3).sum(dim=0),
        (c4 + 4 * d * c3 + 6 * d**2 * c2 + n * d**4).sum(dim=0),
    ]
    sums, peak = parts[..., 5:-1].sum(dim=0), parts[..., -1:].amax(dim=0)
    return torch.cat([torch.stack([count, whole, *central], dim=-1), sums, peak], dim=-1)


def empty_moments(device: torch.device | str = "cpu") -> Float[Tensor, " moments"]:
    """Moments of no data, the neutral element of `merge_moments`."""
    return torch.zeros(len(MOMENTS), dtype=_wide(torch.device(device)), device=device)


def measures_from(
    moments: Float[Tensor, "*sites moments"],
) -> dict[str, Float[Tensor, "*sites"]]:
    """Every measure of a stream by name: see the function of each. NaN where there is no data."""
    return {name: measure(moments) for name, measure in MEASURES.items()}


def excess_kurtosis(x: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    r"""Tailedness of all numbers together: 0 for a normal distribution, large with outliers.

    .. math:: \kappa = \frac{m_4}{m_2^2} - 3 ,\qquad m_p = \mathrm{mean}\,(x - \bar x)^p

    Example:
        >>> excess_kurtosis(torch.tensor([[-1.0, 1.0, -1.0, 1.0]])).item()
        -2.0

    Returns:
        float64; NaN when all numbers are equal.

    Raises:
        ShapeError: No rows, or numbers that are not finite.

    Source: Fisher's definition without bias correction, `scipy.stats.kurtosis(x, axis=None)`.
    """
    return _kurtosis(_checked(x))


def crest_factor(x: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    r"""Largest magnitude of all numbers over their root mean square, >= 1.

    .. math:: C = \frac{\max |x|}{\sqrt{\mathrm{mean}\, x^2}}

    It grows with the number of rows; `incoherence` is the same ratio row by row, and does not.

    Example:
        >>> crest_factor(torch.tensor([[0.0, 0.0, 0.0, 5.0]])).item()
        2.0

    Raises:
        ShapeError: No rows, or numbers that are not finite.

    Source: the peak-to-RMS ratio of signal processing.
    """
    return _crest(_checked(x))


def tail_share(x: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    r"""Share of numbers further than 6 standard deviations of their row from the row's mean.

    2e-9 for a normal distribution; zero for rows of fewer than 38 numbers, where none can be.

    Example:
        >>> tail_share(torch.tensor([[99.0] + [0.0] * 99])).item()
        0.01

    Raises:
        ShapeError: No rows, or numbers that are not finite.

    Source: the 6 sigma rule by row (a row is what one scale quantises); ours.
    """
    return _tail(_checked(x))


def incoherence(x: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    r"""How much of a row stands in one coordinate: 1 when flat, sqrt(d) for a single spike.

    .. math:: \mu = \mathrm{mean}_r\; \sqrt d\, \frac{\max_j |x_{rj}|}{\lVert x_r \rVert_2}

    Example:
        >>> incoherence(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 3.0, 0.0]])).item()
        1.5

    Raises:
        ShapeError: No rows, or numbers that are not finite.

    Source: incoherence of QuIP (arXiv 2307.13304), of rows; those that are all zero are left out.
    """
    return _row_mean("incoherence")(_checked(x))


def quantization_snr(x: Float[Tensor, "rows d"], bits: int = 8) -> Float[Tensor, ""]:
    r"""Signal-to-noise ratio of absmax quantisation (dB), row by row.

    .. math:: \mathrm{SNR} = \mathrm{mean}_r\; 10 \log_{10}
       \frac{\lVert x_r \rVert^2}{\lVert Q_b(x_r) - x_r \rVert^2}

    Example:
        >>> bool(quantization_snr(torch.randn(9, 64), 8) > quantization_snr(torch.randn(9, 64), 4))
        True

    Args:
        x: Activations.
        bits: 8 or 4.

    Returns:
        dB, at most 144.5 (a row that stands on the grid has no noise).

    Raises:
        ShapeError: No rows, or numbers that are not finite.
        ConfigError: Other `bits`.

    Source: quantiser `functional.round_rows`; the mean over rows in dB ours.
    """
    if f"snr_int{bits}" not in MOMENTS:
        raise ConfigError(
            "the signal-to-noise ratio is measured at 8 or 4 bits", got=f"bits={bits!r}",
            fix="Use bits=8 or bits=4.",
        )  # fmt: skip
    return _row_mean(f"snr_int{bits}")(_checked(x))


def check_rows(x: Tensor) -> None:
    """Raise unless `x` is a matrix of finite floats with at least one number.

    Raises:
        ShapeError: It is not.
    """
    if x.dim() != 2 or x.numel() == 0 or not x.is_floating_point():
        raise ShapeError(
            "outliers are measured on a non-empty float matrix (rows, d)",
            got=f"{x.dtype} of shape {tuple(x.shape)}",
            fix="Flatten the leading axes with x.reshape(-1, x.shape[-1]).",
        )
    check_finite(x, "the activations")


def _checked(x: Tensor) -> Tensor:
    check_rows(x)
    return outlier_moments(x)


def _at(moments: Tensor, name: str) -> Tensor:
    return moments[..., MOMENTS.index(name)]


def _kurtosis(moments: Tensor) -> Tensor:
    n, mean, c2, c4 = (_at(moments, f) for f in ("values", "mean", "central2", "central4"))
    rounding = 4 * torch.finfo(moments.dtype).eps * mean.abs()
    return (n * c4 / c2.square() - 3).where((c2 / n).sqrt() > rounding, math.nan)


def _crest(moments: Tensor) -> Tensor:
    return _at(moments, "peak") / (_at(moments, "energy") / _at(moments, "values")).sqrt()


def _tail(moments: Tensor) -> Tensor:
    return _at(moments, "beyond") / _at(moments, "rows")


def _row_mean(name: str) -> Callable[[Tensor], Tensor]:
    return lambda moments: _at(moments, name) / _at(moments, "rows")


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "kurtosis": _kurtosis,
    "crest": _crest,
    "tail_share": _tail,
    "incoherence": _row_mean("incoherence"),
    "snr_int8": _row_mean("snr_int8"),
    "snr_int4": _row_mean("snr_int4"),
}
"""Name of a measure -> what it makes of the moments of a stream."""
