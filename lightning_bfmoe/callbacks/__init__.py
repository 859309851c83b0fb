"""Floor 5: the Lightning side. A callback reads a step, asks `plan`, sets a value, logs."""

from lightning_bfmoe.callbacks.butterfly_moe import ButterflyMoECallback
from lightning_bfmoe.callbacks.outliers import ActivationOutliers
from lightning_bfmoe.callbacks.usage import ExpertUsage

__all__ = ["ActivationOutliers", "ButterflyMoECallback", "ExpertUsage"]
