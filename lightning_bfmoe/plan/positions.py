"""Positions in a training: a fraction of it (float) or a number of optimizer steps (int)."""

import math

from lightning_bfmoe.errors import ConfigError


def check_position(name: str, value: object) -> None:
    """A position is an int >= 0 or a float in [0, 1].

    Raises:
        ConfigError: It is neither.
    """
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


def check_order(start: float, end: float) -> None:
    """An end does not come before its start.

    Raises:
        ConfigError: It does.
    """
    if start > end:
        raise ConfigError(
            "the end of a plan must not come before its start",
            got=f"start={start}, end={end}",
            fix="Note that floats are fractions of the training and ints are steps.",
        )


def needs_length(value: int | float | None) -> bool:
    """Whether a position can only be found when the length of the training is known."""
    return isinstance(value, float) and value != 0


def to_steps(value: int | float, length: int) -> int:
    """A position in optimizer steps.

    Example:
        >>> to_steps(0.5, 12), to_steps(5, 12)
        (6, 5)
    """
    return round(value * length) if isinstance(value, float) else value


def is_length(total: object) -> bool:
    """Whether a number of steps is known: not None, -1 or infinite."""
    return isinstance(total, int | float) and math.isfinite(total) and total >= 0
