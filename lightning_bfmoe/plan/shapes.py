"""How lambda rises: functions on [0, 1], monotone, exactly 0 at 0 and 1 at 1."""

import math
from collections.abc import Callable

_STEEPNESS = {"exponential": 5.0, "sigmoid": 12.0}


def _linear(t: float) -> float:
    return t


def _cosine(t: float) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * t))


def _exponential(t: float) -> float:
    rate = _STEEPNESS["exponential"]
    return math.expm1(-rate * t) / math.expm1(-rate)


def _sigmoid(t: float) -> float:
    rate = _STEEPNESS["sigmoid"]
    return 0.5 + 0.5 * math.tanh(rate * (t - 0.5) / 2) / math.tanh(rate / 4)


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "sigmoid": _sigmoid,
}
"""Name -> shape. `exponential` rises fast first."""
