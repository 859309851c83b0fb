"""Experts that a model's own loop calls one by one, on top of one shared `ButterflyExperts`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_bfmoe.layers import ButterflyExperts


class OneExpert:
    """One expert of an `ExpertList` as a function of tokens; it holds no weights of its own.

    Args:
        experts: The list.
        index: Which expert.
    """

    def __init__(self, experts: "ExpertList", index: int) -> None:
        self.experts, self.index = experts, index

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens (..., d_model) to (..., d_out), all through this expert."""
        if x.numel() == 0:  # a loop may call an expert that no token visits
            return x.new_zeros(*x.shape[:-1], self.experts.d_out)
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, d_model)
        chosen = torch.full((tokens.shape[0], 1), self.index, dtype=torch.int64, device=x.device)
        y = self.experts(tokens, chosen, torch.ones(chosen.shape, dtype=x.dtype, device=x.device))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class ExpertList(ButterflyExperts):
    """`ButterflyExperts` that can be indexed like the `ModuleList` of experts it replaces.

    Example:
        >>> experts = ExpertList(8, 32, num_experts=4)
        >>> len(experts), experts[2](torch.randn(5, 8)).shape
        (4, torch.Size([5, 8]))
    """

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> OneExpert:
        return OneExpert(self, range(self.num_experts)[index])

    def __iter__(self) -> Iterator[OneExpert]:
        return (self[i] for i in range(self.num_experts))
