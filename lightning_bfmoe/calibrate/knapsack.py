"""Which of several options each submodule gets under one budget: an exact small knapsack."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_bfmoe.errors import CalibrationError

_STATES = 200_000  # partial choices that are kept apart


class Option(NamedTuple):
    """One way to go on with one submodule."""

    name: str
    size: int
    """What it takes of the budget (bytes, or a count)."""
    cost: float
    """What it loses."""


def choose(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    r"""One option a group with the least total cost whose total size is within the budget.

    .. math:: \min \sum_g c_{g, o(g)} \quad\text{subject to}\quad \sum_g s_{g, o(g)} \le S

    Group by group the partial choices are kept that no other one beats in both size and cost, which
    loses no optimum. Where these would be more than 200 000 (many groups of many distinct sizes),
    sizes are rounded up to a thousandth of the budget over the number of groups: the budget still
    holds, the cost is that of a budget smaller by at most a thousandth.

    Example:
        >>> keep, drop = Option("keep", 10, 0.0), Option("drop", 0, 0.5)
        >>> choose([[keep, drop], [Option("keep", 10, 0.0), Option("drop", 0, 0.1)]], 10)
        [0, 1]

    Args:
        groups: Options of each submodule, at least one.
        budget: S, >= 0.

    Returns:
        The index of the option in each group.

    Raises:
        CalibrationError: Even the smallest options exceed the budget.
    """
    least = sum(min(option.size for option in group) for group in groups)
    if least > budget:
        raise CalibrationError(
            "a budget holds at least the smallest option of every submodule",
            got=f"a budget of {budget}, and {least} at the least",
            fix=f"Raise it to {least} or more, or allow smaller options.",
        )
    chosen = _frontier(groups, budget, 1)
    if chosen is None:
        unit = max(1, budget // (1000 * max(1, len(groups))))
        chosen = _frontier(groups, budget, unit)
    assert chosen is not None
    return chosen


def _frontier(groups: Sequence[Sequence[Option]], budget: int, unit: int) -> list[int] | None:
    # a state: (size, cost, index of the option, state before)
    room = budget // unit
    states: list[tuple[int, float, int, tuple | None]] = [(0, 0.0, -1, None)]
    rest = [min(-(-o.size // unit) for o in group) for group in groups]
    later = sum(rest)
    if later > room:  # rounding took the room; the exact sizes fit, so take the smallest ones
        return [min(range(len(g)), key=lambda i: (g[i].size, g[i].cost)) for g in groups]
    for group, smallest in zip(groups, rest, strict=True):
        later -= smallest
        grown = [
            (state[0] - (-option.size // unit), state[1] + option.cost, i, state)
            for state in states
            for i, option in enumerate(group)
        ]
        grown = [state for state in grown if state[0] + later <= room]
        grown.sort(key=lambda state: (state[0], state[1]))
        states, best = [], float("inf")
        for state in grown:
            if state[1] < best:
                best = state[1]
                states.append(state)
        if unit == 1 and len(states) > _STATES:
            return None
    at: tuple | None = states[-1]  # the largest size on the frontier has the least cost
    found: list[int] = []
    while at is not None and at[3] is not None:
        found.append(at[2])
        at = at[3]
    return found[::-1]


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """A number of bytes from ``40MB``, ``1.5 GiB`` or a number.

    Example:
        >>> parse_bytes("40MB"), parse_bytes("1 MiB"), parse_bytes(7)
        (40000000, 1048576, 7)

    Raises:
        CalibrationError: It is none of these.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    stripped = str(text).replace(" ", "")
    number = stripped.rstrip("BKMGIbkmgi")
    unit = stripped[len(number) :].upper()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit not in _UNITS or not 0 <= value < float("inf") or isinstance(text, bool):
        raise CalibrationError(
            "a budget is a number of bytes, as text with a unit or as an integer",
            got=repr(text),
            fix="Write budget='40MB' (10^6), '40MiB' (2^20) or 40_000_000.",
        )
    return int(value * _UNITS[unit])
