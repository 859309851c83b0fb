"""The training plan: from the number of finished optimizer steps to lambda and the factors."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan.positions import (
    check_order,
    check_position,
    is_length,
    needs_length,
    to_steps,
)
from lightning_bfmoe.plan.shapes import SHAPES

_POSITIONS = ("start", "end", "angle_warmup", "freeze_latents", "second_stage")


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
    lr_factor: float = 1.0
    """Factor on every learning rate: that of the second stage, else 1."""
    decay_factor: float = 1.0
    """Factor on every weight decay: that of the second stage, else 1."""


class PlanSteps(NamedTuple):
    """A plan's positions in optimizer steps."""

    start: int
    end: int
    angle_warmup: int
    freeze_latents: int
    second_stage: int | None


@dataclass(frozen=True)
class Plan:
    """When the weights become ternary, how the angles start, and what holds when.

    Each position is a fraction of the training (float in [0, 1]) or a number of optimizer steps
    (int): ``start=0.1`` is a tenth of the training, ``start=100`` is step 100, ``end=1.0`` is its
    end and ``end=1`` the first step.

    Example:
        >>> [round(plan_at(step, 100, Plan()).blend, 2) for step in (0, 10, 35, 60, 100)]
        [0.0, 0.0, 0.5, 1.0, 1.0]

    Raises:
        ConfigError: A position is negative, not finite or a fraction above 1, the end comes before
            the start, the shape is unknown, or a factor is out of range.
    """

    start: int | float = 0.1
    """Where lambda leaves 0 (fraction of the training, or optimizer steps)."""
    end: int | float = 0.6
    """Where lambda reaches 1 (fraction of the training, or optimizer steps)."""
    shape: Literal["linear", "cosine", "exponential", "sigmoid"] = "cosine"
    """How lambda rises between the two."""
    angle_warmup: int | float = 0
    """Length of the linear warm-up of the angles' learning rate (fraction, or optimizer steps)."""
    freeze_latents: int | float = 0
    """Length of a first phase in which the latent matrices stand still while angles, gains, biases
    and the router learn (fraction, or optimizer steps)."""
    second_stage: int | float | None = None
    """Where BitNet's second stage begins (fraction, or optimizer steps); 0.5 there, None: never."""
    second_lr_factor: float = 0.6
    """Factor > 0 on every learning rate in the second stage (BitNet: 0.53 to 0.67)."""
    second_decay_factor: float = 0.0
    """Factor >= 0 on every weight decay in the second stage (BitNet: 0)."""

    def __post_init__(self) -> None:
        """Check each position, and their order where both are of one kind."""
        for name in _POSITIONS:
            value = getattr(self, name)
            if value is not None or name != "second_stage":
                check_position(name, value)
        if self.shape not in SHAPES:
            raise ConfigError(
                f"the shape of a plan must be one of {tuple(SHAPES)}",
                got=f"shape={self.shape!r}",
                fix="Use shape='cosine'.",
            )
        _check_factor("second_lr_factor", self.second_lr_factor, positive=True)
        _check_factor("second_decay_factor", self.second_decay_factor, positive=False)
        if type(self.start) is type(self.end):
            check_order(self.start, self.end)

    @property
    def is_absolute(self) -> bool:
        """Whether every position is a number of steps (or 0.0), so that no total is needed."""
        return not any(needs_length(getattr(self, name)) for name in _POSITIONS)

    def steps(self, total: float | None) -> PlanSteps:
        """The positions in optimizer steps.

        Args:
            total: Optimizer steps of the whole training; None is enough for an absolute plan.

        Raises:
            ConfigError: Fractions of an unknown length (None, -1, infinite), or the end comes
                before the start.
        """
        if not self.is_absolute and not is_length(total):
            raise ConfigError(
                "a plan in fractions needs the number of training steps",
                got=f"{total} steps",
                fix="Set Trainer(max_steps=...), give the callback total_steps=..., or write the "
                "plan in steps: Plan(start=1000, end=6000).",
            )
        length = max(int(total or 0), 1) if is_length(total) else 1
        second = None if self.second_stage is None else to_steps(self.second_stage, length)
        found = PlanSteps(
            to_steps(self.start, length),
            to_steps(self.end, length),
            to_steps(self.angle_warmup, length),
            to_steps(self.freeze_latents, length),
            second,
        )
        check_order(found.start, found.end)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return dataclasses.asdict(self)


def plan_at(step: int, total: float | None, plan: Plan | None = None) -> PlanState:
    r"""What holds during the optimizer step that follows `step` finished ones.

    .. math:: \lambda(s) = g\big((s - s_0) / (s_1 - s_0)\big)

    with a shape g that rises from exactly 0 to exactly 1, and constant outside.

    Example:
        >>> state = plan_at(3, 10, Plan(start=2, end=4, shape="linear", freeze_latents=5))
        >>> state.blend, state.latent_factor, state.phase
        (0.5, 0.0, 'blending')

    Args:
        step: Optimizer steps finished so far, >= 0.
        total: Optimizer steps of the whole training; 0 counts as 1. Not read by an absolute plan.
        plan: The plan; ``Plan()`` when None.

    Raises:
        ConfigError: The plan is in fractions and `total` is unknown (None, -1, infinite).

    Source: BitNet-style gradual quantisation, and the second stage of "The Era of 1-bit LLMs:
    Training Tips, Code and FAQ"; the shapes and the frozen phase ours.
    """
    plan = plan or Plan()
    at = plan.steps(total)
    blend, phase = _blend(step, at, plan.shape)
    second = at.second_stage is not None and step >= at.second_stage
    return PlanState(
        blend,
        1.0 if step >= at.angle_warmup else (step + 1) / (at.angle_warmup + 1),
        1.0 if step >= at.freeze_latents else 0.0,
        phase,
        float(plan.second_lr_factor) if second else 1.0,
        float(plan.second_decay_factor) if second else 1.0,
    )


def _blend(
    step: int, at: PlanSteps, shape: str
) -> tuple[float, Literal["latent", "blending", "ternary"]]:
    if step >= at.end:
        return 1.0, "ternary"
    if step <= at.start:
        return 0.0, "latent"
    value = SHAPES[shape]((step - at.start) / (at.end - at.start))
    return min(max(value, 0.0), 1.0), "blending"


def _check_factor(name: str, value: object, *, positive: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):  # type: ignore[arg-type,operator]
        raise ConfigError(
            f"{name} must be a finite number {'>' if positive else '>='} 0",
            got=f"{name}={value!r}",
            fix="Use 1.0 to change nothing in the second stage.",
        )
