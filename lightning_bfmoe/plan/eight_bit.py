"""Optimizers with 8-bit state (bitsandbytes): the small parameters of ours keep float32 moments."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def keep_wide_state(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Give parameters their state in float32 in an optimizer that would choose 8 bits.

    Their state is made at once, by the optimizer itself, so it must be done before the first step.
    bitsandbytes' own overrides (`GlobalOptimManager`) are asked by it as ever; we add none, because
    they go by `id(parameter)` and would meet another parameter after this one is gone.

    Args:
        optimizer: Any torch optimizer; only those of bitsandbytes with 8-bit state are touched.
        parameters: Those with few numbers and small steps: angles, gains, biases, routers.

    Returns:
        Number of parameters that have such state now.

    Source: measured (docs/decisions.md).
    """
    settings: Any = getattr(optimizer, "args", None)
    initialise: Any = getattr(optimizer, "init_state", None)
    bits = getattr(settings, "optim_bits", 32)
    if bits == 32 or initialise is None:
        return 0
    asked, done = {id(p) for p in parameters}, 0
    try:
        settings.optim_bits = 32
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                if id(p) in asked and not optimizer.state.get(p):
                    initialise(group, p, i, j)
                    done += 1
    finally:
        settings.optim_bits = bits
    return done
