"""One expert of a layer as a function: for models whose own loop calls the experts one by one."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_bfmoe.layers.experts import ButterflyExperts


class OneExpert:
    """Expert `index` of a layer as a function of tokens; it holds no weights of its own.

    Args:
        experts: The layer.
        index: Which expert.
    """

    def __init__(self, experts: "ButterflyExperts", index: int) -> None:
        self.experts, self.index = experts, index

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens (..., d_model) to (..., d_out), all through this expert."""
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, d_model)
        chosen = torch.full((tokens.shape[0], 1), self.index, dtype=torch.int64, device=x.device)
        y = self.experts(tokens, chosen, torch.ones(chosen.shape, dtype=x.dtype, device=x.device))
        return y.reshape(*x.shape[:-1], y.shape[-1])
