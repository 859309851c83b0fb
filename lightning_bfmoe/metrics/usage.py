"""Use of the experts over a stream of routing decisions as torchmetrics classes.

All of them hold the same state, the int64 load of every expert, which sums over batches and ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional.routing import expert_load
from lightning_bfmoe.functional.usage import dead_experts, load_entropy, max_violation

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ExpertLoad(Metric):
    """How many (token, slot) pairs each expert received.

    Example:
        >>> metric = ExpertLoad(num_experts=4)
        >>> metric.update(torch.tensor([[0, 2], [2, 1]]))
        >>> metric.compute().tolist()
        [1, 1, 2, 0]

    Args:
        num_experts: Experts of the layer (count, >= 1).
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        ConfigError: `num_experts` is out of range.

    Source: `functional.expert_load`.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    load: Tensor

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
            raise ConfigError(
                "num_experts must be an integer >= 1",
                got=f"num_experts={num_experts!r}",
                fix="Pass the layer's own: layer.experts.num_experts.",
            )
        self.num_experts = num_experts
        zeros = torch.zeros(num_experts, dtype=torch.int64)
        self.add_state("load", default=zeros, dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Return the metric unchanged: int64 counts in a narrower type would be wrong."""
        return self

    def update(self, experts: Tensor) -> None:
        """Take in chosen expert ids of any shape, as `layer.last_routing.experts`.

        Raises:
            ShapeError: No ids, not integers (a NaN hides in a float), or an id out of range.
        """
        if experts.dtype not in _INTEGERS or experts.numel() == 0:
            raise ShapeError(
                "expert ids are a non-empty integer tensor",
                got=f"{experts.dtype} of shape {tuple(experts.shape)}",
                fix="Pass layer.last_routing.experts.",
            )
        low, high = torch.aminmax(experts)
        if int(low) < 0 or int(high) >= self.num_experts:
            raise ShapeError(
                f"expert ids lie in 0 .. {self.num_experts - 1}",
                got=f"{int(low)} .. {int(high)}",
                fix="Build the metric with the layer's num_experts.",
            )
        self.load = self.load + expert_load(experts.to(torch.int64), self.num_experts)

    def compute(self) -> Tensor:
        """(experts,) int64."""
        return self.load


class LoadEntropy(ExpertLoad):
    """Entropy of the load, see `functional.usage.load_entropy`.

    Example:
        >>> metric = LoadEntropy(num_experts=4)
        >>> metric(torch.tensor([[0, 1], [1, 0]])).item()
        0.5

    Args:
        num_experts: Experts of the layer (count, >= 1).
        normalized: Divide by ln(num_experts), so that 1 is even use; otherwise in nats.
        **kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, num_experts: int, normalized: bool = True, **kwargs: Any) -> None:
        super().__init__(num_experts, **kwargs)
        self.normalized = normalized

    def compute(self) -> Tensor:
        """0-d float64; NaN before the first token."""
        return load_entropy(self.load, self.normalized)


class MaxViolation(ExpertLoad):
    """Load of the fullest expert over the mean load, minus 1, see `functional.usage`.

    Example:
        >>> metric = MaxViolation(num_experts=4)
        >>> metric(torch.tensor([[0, 1], [1, 0]])).item()
        1.0
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """0-d float64; NaN before the first token."""
        return max_violation(self.load)


class DeadExperts(ExpertLoad):
    """How many experts received nothing.

    Example:
        >>> metric = DeadExperts(num_experts=4)
        >>> metric(torch.tensor([[0, 1], [1, 0]])).item()
        2
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """0-d int64."""
        return dead_experts(self.load)
