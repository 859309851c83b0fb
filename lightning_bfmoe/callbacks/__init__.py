"""Floor 5: the Lightning side. A callback reads a step, asks `plan`, sets a value, logs."""

from lightning_bfmoe.callbacks.butterfly_moe import ButterflyMoECallback

__all__ = ["ButterflyMoECallback"]
