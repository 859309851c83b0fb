"""Outlier measures of a stream of activations as torchmetrics classes.

All of them hold the same state, one float64 vector of moments (`functional.outliers.MOMENTS`), so
ranks are reduced by one collective and a `MetricCollection` updates it once for all its members.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.outliers import (
    MEASURES,
    check_rows,
    empty_moments,
    measures_from,
    merge_moments,
    outlier_moments,
)


class _MomentsMetric(Metric):
    """Accumulates `outlier_moments`; what is computed from them is the subclass's."""

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", default=empty_moments(), dist_reduce_fx=merge_moments)

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Return the metric unchanged: float64 moments in a narrower type would be wrong."""
        return self

    def update(self, x: Tensor) -> None:
        """Take in a batch of rows (rows, d), of any floating dtype; d may differ between calls.

        Raises:
            ShapeError: No rows, another shape, or numbers that are not finite.
        """
        check_rows(x)
        self.moments = merge_moments(torch.stack([self.moments, outlier_moments(x)]))


class OutlierMeasures(_MomentsMetric):
    """Every outlier measure of a stream of rows, by name.

    Example:
        >>> metric = OutlierMeasures()
        >>> metric.update(torch.ones(2, 4))
        >>> metric.update(-torch.ones(2, 4))
        >>> {name: round(value.item(), 1) for name, value in metric.compute().items()}
        {'kurtosis': -2.0, 'crest': 1.0, 'tail_share': 0.0, 'incoherence': 1.0,
         'snr_int8': 144.5, 'snr_int4': 144.5}

    Source: `functional.outliers`, where each measure has its formula.
    """

    def compute(self) -> dict[str, Tensor]:
        """Name -> float64 value."""
        return measures_from(self.moments)


class _OneMeasure(_MomentsMetric):
    measure: str

    def compute(self) -> Tensor:
        """The measure of all rows so far, float64; NaN where it is undefined."""
        return MEASURES[self.measure](self.moments)


class ExcessKurtosis(_OneMeasure):
    """Tailedness of all numbers together, see `functional.outliers.excess_kurtosis`.

    Example:
        >>> metric = ExcessKurtosis()
        >>> metric.update(torch.tensor([[-1.0, 1.0]]))
        >>> metric.update(torch.tensor([[1.0, -1.0]]))
        >>> metric.compute().item()
        -2.0
    """

    measure = "kurtosis"


class CrestFactor(_OneMeasure):
    """Largest magnitude over root mean square, see `functional.outliers.crest_factor`.

    Example:
        >>> metric = CrestFactor()
        >>> metric(torch.tensor([[0.0, 0.0, 0.0, 5.0]])).item()
        2.0
    """

    measure = "crest"


class TailShare(_OneMeasure):
    """Share of numbers beyond 6 sigma of their row, see `functional.outliers.tail_share`.

    Example:
        >>> metric = TailShare()
        >>> metric(torch.tensor([[99.0] + [0.0] * 99])).item()
        0.01
    """

    measure = "tail_share"


class Incoherence(_OneMeasure):
    """Mean over rows of sqrt(d) max|x| / ||x||, see `functional.outliers.incoherence`.

    Example:
        >>> metric = Incoherence()
        >>> metric(torch.tensor([[0.0, 0.0, 3.0, 0.0]])).item()
        2.0
    """

    measure = "incoherence"


class QuantizationSNR(_OneMeasure):
    """Signal-to-noise ratio of absmax quantisation, see `functional.outliers.quantization_snr`.

    Example:
        >>> metric = QuantizationSNR(bits=4)
        >>> round(metric(torch.tensor([[7.0, 2.5]])).item(), 2)
        23.44

    Args:
        bits: 8 or 4.
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        ConfigError: Other `bits`.
    """

    higher_is_better = True

    def __init__(self, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if f"snr_int{bits}" not in MEASURES:
            raise ConfigError(
                "the signal-to-noise ratio is measured at 8 or 4 bits",
                got=f"bits={bits!r}",
                fix="Use bits=8 or bits=4.",
            )
        self.bits, self.measure = bits, f"snr_int{bits}"
