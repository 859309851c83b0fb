"""Optimizers with 8-bit state (bitsandbytes): the small parameters of ours keep float32 moments."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def keep_wide_state(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Ask an 8-bit optimizer for float32 state of some parameters; no other one is touched.

    Goes through bitsandbytes' own manager of overrides, found at the optimizer, so that nothing is
    imported. It must be done before the first step; later the state is there already. An override
    of the user's stays.

    Args:
        optimizer: Any torch optimizer.
        parameters: Those with few numbers and small steps: angles, gains, biases, routers.

    Returns:
        Number of parameters that were asked for.

    Source: measured (docs/decisions.md).
    """
    manager: Any = getattr(optimizer, "mng", None)
    if not hasattr(manager, "override_config"):
        return 0
    known = getattr(manager, "pid2config", {})
    asked = [p for p in parameters if "optim_bits" not in known.get(id(p), {})]
    for parameter in asked:
        manager.override_config(parameter, "optim_bits", 32)
    return len(asked)
