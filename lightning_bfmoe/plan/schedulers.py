"""Learning-rate schedulers that follow when an optimizer's groups are split.

torch (2.10 and later) walks groups and a scheduler's per-group values in strict step, so every list
must grow with the groups, in schedulers that others are made of too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Where a new group comes from: old group `source`, with its learning rate times `factor`."""

    source: int
    factor: float


# Per-group lists that hold learning rates: they are scaled.
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
# Per-group lists that hold something else: they are repeated.
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums", "swa_lrs")
# Learning rates that schedulers and finders keep in the groups themselves.
RATE_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def extend_scheduler(scheduler: Any, pieces: Sequence[Piece], groups_before: int) -> None:
    """Give a scheduler one value per new group; schedulers inside it too.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        >>> extend_scheduler(scheduler, [Piece(0, 1.0), Piece(0, 20.0)], groups_before=1)
        >>> scheduler.base_lrs
        [0.1, 2.0]

    Args:
        scheduler: Any scheduler of `torch.optim.lr_scheduler`, or one of its kind.
        pieces: The groups after the split, in order.
        groups_before: Number of groups before it.
    """
    seen: set[int] = set()
    waiting = [scheduler]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        for name in (*_RATES, *_OTHERS):
            values = vars(one).get(name)
            if isinstance(values, list | tuple) and len(values) == groups_before:
                scale = _scaled if name in _RATES else _kept
                setattr(one, name, type(values)(scale(values[p.source], p.factor) for p in pieces))
        waiting += list(vars(one).get("_schedulers", ()))
        waiting += [vars(one).get("after_scheduler"), vars(one).get("anneal_scheduler")]


def _scaled(value: Any, factor: float) -> Any:
    return value if factor == 1.0 else value * factor


_kept: Callable[[Any, float], Any] = lambda value, factor: value  # noqa: E731
