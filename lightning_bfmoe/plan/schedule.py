"""The training plan: from the number of finished optimizer steps to lambda and the angle factor."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_bfmoe.errors import ConfigError

_STEEPNESS = {"exponential": 5.0, "sigmoid": 12.0}


class PlanState(NamedTuple):
    """What holds during one optimizer step."""

    blend: float
    """Lambda in [0, 1]: 0 computes with the latent weights, 1 with the ternary ones."""
    angle_factor: float
    """Factor in (0, 1] on the learning rate of the angles."""
    latent_factor: float
    """Factor on the learning rate of the latent matrices: 0 while they are frozen, else 1."""
    phase: Literal["latent", "blending", "ternary"]
    """Before, while and after lambda rises."""


@dataclass(frozen=True)
class Plan:
    """When the weights become ternary, and how the angles start.

    Each position is a fraction of the training (float in [0, 1]) or a number of optimizer steps
    (int): ``start=0.1`` is a tenth of the training, ``start=100`` is step 100, ``end=1.0`` is its
    end and ``end=1`` the first step.

    Example:
        >>> [round(plan_at(step, 100, Plan()).blend, 2) for step in (0, 10, 35, 60, 100)]
        [0.0, 0.0, 0.5, 1.0, 1.0]

    Raises:
        ConfigError: A position is negative, not finite or a fraction above 1, the end comes before
            the start, or the shape is unknown.
    """

    start: int | float = 0.1
    """Where lambda leaves 0 (fraction of the training, or optimizer steps)."""
    end: int | float = 0.6
    """Where lambda reaches 1 (fraction of the training, or optimizer steps)."""
    shape: Literal["linear", "cosine", "exponential", "sigmoid"] = "cosine"
    """How lambda rises between the two."""
    angle_warmup: int | float = 0
    """Length of the linear warm-up of the angles' learning rate (fraction, or optimizer steps)."""

    def __post_init__(self) -> None:
        """Check each position, and their order where both are of one kind."""
        for name in ("start", "end", "angle_warmup"):
            _check_position(name, getattr(self, name))
        if self.shape not in SHAPES:
            raise ConfigError(
                f"the shape of a plan must be one of {tuple(SHAPES)}",
                got=f"shape={self.shape!r}",
                fix="Use shape='cosine'.",
            )
        if type(self.start) is type(self.end):
            _check_order(self.start, self.end)

    @property
    def is_absolute(self) -> bool:
        """Whether every position is a number of steps (or 0.0), so that no total is needed."""
        positions = (self.start, self.end, self.angle_warmup)
        return not any(isinstance(value, float) and value for value in positions)

    def steps(self, total: float | None) -> tuple[int, int, int]:
        """Start, end and angle warm-up in optimizer steps.

        Args:
            total: Optimizer steps of the whole training; None is enough for an absolute plan.

        Raises:
            ConfigError: Fractions of an unknown length (None, -1, infinite), or the end comes
                before the start.
        """
        if not self.is_absolute and not _is_length(total):
            raise ConfigError(
                "a plan in fractions needs the number of training steps",
                got=f"{total} steps",
                fix="Set Trainer(max_steps=...), give ButterflyMoECallback(total_steps=...), or "
                "write the plan in steps: Plan(start=1000, end=6000).",
            )
        length = max(int(total or 0), 1) if _is_length(total) else 1
        start, end, warmup = (
            round(v * length) if isinstance(v, float) else v
            for v in (self.start, self.end, self.angle_warmup)
        )
        _check_order(start, end)
        return start, end, warmup

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return dataclasses.asdict(self)


def plan_at(step: int, total: float | None, plan: Plan | None = None) -> PlanState:
    r"""What holds during the optimizer step that follows `step` finished ones.

    .. math:: \lambda(s) = g\big((s - s_0) / (s_1 - s_0)\big)

    with a shape g that rises from exactly 0 to exactly 1, and constant outside.

    Example:
        >>> plan_at(3, 10, Plan(start=2, end=4, shape="linear"))
        PlanState(blend=0.5, angle_factor=1.0, latent_factor=1.0, phase='blending')

    Args:
        step: Optimizer steps finished so far, >= 0.
        total: Optimizer steps of the whole training; 0 counts as 1. Not read by an absolute plan.
        plan: The plan; ``Plan()`` when None.

    Raises:
        ConfigError: The plan is in fractions and `total` is unknown (None, -1, infinite).

    Source: BitNet-style gradual quantisation; the shapes ours.
    """
    plan = plan or Plan()
    start, end, warmup = plan.steps(total)
    angle_factor = 1.0 if step >= warmup else (step + 1) / (warmup + 1)
    if step >= end:
        return PlanState(1.0, angle_factor, 1.0, "ternary")
    if step <= start:
        return PlanState(0.0, angle_factor, 1.0, "latent")
    blend = SHAPES[plan.shape]((step - start) / (end - start))
    return PlanState(min(max(blend, 0.0), 1.0), angle_factor, 1.0, "blending")


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
"""Name -> g on [0, 1], monotone, 0 at 0 and 1 at 1. `exponential` rises fast first."""


def _check_position(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        rule = f"{name} must be a fraction in [0, 1] (float) or a number of steps >= 0 (int)"
        raise ConfigError(rule, got=f"{name}={value!r}", fix="Use 0.1 for a tenth of the training.")
    if isinstance(value, float) and value > 1:
        raise ConfigError(
            f"{name} as a float is a fraction of the training and at most 1.0",
            got=f"{name}={value!r}",
            fix=f"Use {name}={round(value)} for a number of steps.",
        )


def _check_order(start: float, end: float) -> None:
    if start > end:
        raise ConfigError(
            "the end of a plan must not come before its start",
            got=f"start={start}, end={end}",
            fix="Note that floats are fractions of the training and ints are steps.",
        )


def _is_length(total: object) -> bool:
    return isinstance(total, int | float) and math.isfinite(total) and total >= 0
