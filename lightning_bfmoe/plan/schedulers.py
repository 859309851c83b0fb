"""Learning-rate schedulers that follow when an optimizer's groups are split.

torch (2.10 and later) walks groups and a scheduler's per-group values in strict step, so every list
must grow with the groups, in schedulers that others are made of too.
"""

from collections.abc import Sequence
from typing import Any

# Lists with one value per group. A new group goes on with the value of the group it was cut from.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "min_lrs",
    "max_lrs",
    "lr_lambdas",
    "base_momentums",
    "max_momentums",
    "swa_lrs",
)


def extend_scheduler(scheduler: Any, sources: Sequence[int], groups_before: int) -> None:
    """Give a scheduler one value per new group; schedulers inside it too.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        >>> extend_scheduler(scheduler, [0, 0], groups_before=1)
        >>> scheduler.base_lrs
        [0.1, 0.1]

    Args:
        scheduler: Any scheduler of `torch.optim.lr_scheduler`, or one of its kind.
        sources: For each group after the split, the index of the old group it was cut from.
        groups_before: Number of groups before it.
    """
    seen: set[int] = set()
    waiting = [scheduler]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        for name in _PER_GROUP:
            values = vars(one).get(name)
            if isinstance(values, list | tuple) and len(values) == groups_before:
                setattr(one, name, type(values)(values[i] for i in sources))
        waiting += list(vars(one).get("_schedulers", ()))
        waiting += [vars(one).get("after_scheduler"), vars(one).get("anneal_scheduler")]
