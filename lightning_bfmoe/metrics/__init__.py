"""Floor 3: torchmetrics classes over `functional.outliers` and `functional.usage`."""

from lightning_bfmoe.metrics.outliers import (
    CrestFactor,
    ExcessKurtosis,
    Incoherence,
    OutlierMeasures,
    QuantizationSNR,
    TailShare,
)
from lightning_bfmoe.metrics.usage import DeadExperts, ExpertLoad, LoadEntropy, MaxViolation

__all__ = [
    "CrestFactor",
    "DeadExperts",
    "ExcessKurtosis",
    "ExpertLoad",
    "Incoherence",
    "LoadEntropy",
    "MaxViolation",
    "OutlierMeasures",
    "QuantizationSNR",
    "TailShare",
]
