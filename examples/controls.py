"""What ButterflyMoE is compared with: plain modules that take the place of a GPT's feed-forward.

| control | weights |
|---|---|
| `TernaryFeedForward` | the dense block, its two matrices ternary |
| `StandardMoE` | independent experts, each a copy of the dense block at first (sparse upcycling) |
| `StandardMoE(..., ternary=True)` | the same, every expert ternary |

All start from a trained dense block and compute exactly what it computed: copies whose routing
weights sum to 1 are the original, and the ternary blend lambda starts at 0.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.gpt import GPT, FeedForward
from lightning_bfmoe.functional.ternary import quantize_ternary


class TernaryFeedForward(nn.Module):
    """A dense feed-forward block whose matrices become ternary as ``blend`` goes from 0 to 1.

    Args:
        dense: The block to start from; its weights are copied.
        scale: Ternary scale, see `lightning_bfmoe.functional.ternary.ternarize`.
    """

    def __init__(self, dense: FeedForward, scale: str = "lstsq") -> None:
        super().__init__()
        self.blend, self.scale = 0.0, scale
        self.act = dense.act
        self.up = nn.Parameter(dense.expand.weight.detach().clone())  # [hidden, width]
        self.up_bias = nn.Parameter(dense.expand.bias.detach().clone())
        self.down = nn.Parameter(dense.contract.weight.detach().clone())  # [width, hidden]
        self.down_bias = nn.Parameter(dense.contract.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> same."""
        up = _weight(self.up, self.blend, self.scale)
        down = _weight(self.down, self.blend, self.scale)
        return F.linear(self.act(F.linear(x, up, self.up_bias)), down, self.down_bias)


class StandardMoE(nn.Module):
    """A mixture of independent feed-forward experts with a linear top-k router.

    The weights of the chosen experts are a softmax over their k logits. After a forward,
    ``balance_loss`` holds the Switch load-balance loss of that batch, 1 when perfectly even, and
    ``load`` the number of token slots that each expert got.

    Args:
        dense: The block that every expert starts as a copy of.
        num_experts: Number of experts.
        top_k: Experts that a token visits.
        ternary: Make the experts' matrices ternary as ``blend`` goes from 0 to 1.
        all_tokens: Compute every expert on every token and multiply by the weight, 0 where it was
            not chosen: the same sum by more arithmetic, faster on a GPU for small models.
        scale: Ternary scale, see `lightning_bfmoe.functional.ternary.ternarize`.
        seed: Seed of the router's start, N(0, 0.02^2).

    Source: upcycling arXiv 2212.05055; balance loss arXiv 2101.03961, eq. 4-6, for k > 1.
    """

    def __init__(
        self,
        dense: FeedForward,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        ternary: bool = False,
        all_tokens: bool = False,
        scale: str = "lstsq",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.ternary = num_experts, top_k, ternary
        self.all_tokens = all_tokens
        self.blend, self.scale = 0.0, scale
        self.act = dense.act
        self.balance_loss = torch.zeros(())
        self.load = torch.zeros(num_experts, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        router = 0.02 * torch.randn(num_experts, dense.expand.in_features, generator=generator)
        self.router = nn.Parameter(router)
        self.up = self._copies(dense.expand.weight)  # [experts, hidden, width]
        self.up_bias = self._copies(dense.expand.bias)
        self.down = self._copies(dense.contract.weight)  # [experts, width, hidden]
        self.down_bias = self._copies(dense.contract.bias)

    def _copies(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.stack([tensor.detach()] * self.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> same."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = F.linear(tokens, self.router)  # [tokens, experts]
        best, chosen = logits.topk(self.top_k, dim=-1)  # [tokens, k]
        weights = best.softmax(dim=-1)
        self.balance_loss = self._balance(logits.softmax(dim=-1), chosen)
        blend = self.blend if self.ternary else 0.0
        # unbind, not an index per expert: its gradient is one stack instead of many full zeros
        up = _weight(self.up, blend, self.scale).unbind()
        down = _weight(self.down, blend, self.scale).unbind()
        up_bias, down_bias = self.up_bias.unbind(), self.down_bias.unbind()
        gates = torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))
        out = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            # finding an expert's own tokens makes the host wait for a GPU
            rows = slice(None) if self.all_tokens else gates[:, expert].nonzero().squeeze(1)
            hidden = self.act(F.linear(tokens[rows], up[expert], up_bias[expert]))
            result = F.linear(hidden, down[expert], down_bias[expert])
            result = result * gates[rows, expert, None]
            out = out + result if self.all_tokens else out.index_add(0, rows, result)
        return out.view_as(x)

    def _balance(self, probs: Tensor, chosen: Tensor) -> Tensor:
        self.load = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        share = self.load / chosen.numel()
        return self.num_experts * (share * probs.mean(dim=0)).sum()


class GPTWithBalanceLoss(GPT):
    """The GPT with the one edit that a standard MoE asks of its user: a second loss term.

    Args:
        balance_weight: Weight of the mean Switch loss of all layers.
        **settings: See `GPT`.
    """

    def __init__(self, balance_weight: float = 0.01, **settings: float) -> None:
        super().__init__(**settings)
        self.balance_weight = balance_weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step; ``train_loss`` in the log is the cross-entropy alone."""
        loss = super().training_step(batch, batch_idx)
        losses = [block.mlp.balance_loss for block in self.blocks]
        return loss + self.balance_weight * torch.stack(losses).mean()


def controls(model: nn.Module) -> Iterator[TernaryFeedForward | StandardMoE]:
    """Every control inside a model, in order."""
    for module in model.modules():
        if isinstance(module, TernaryFeedForward | StandardMoE):
            yield module


def set_blend(model: nn.Module, blend: float) -> None:
    """Set the ternary blend lambda of every control: 0 is full precision, 1 is ternary."""
    for module in controls(model):
        module.blend = blend


def _weight(latent: Tensor, blend: float, scale: str) -> Tensor:
    """Latent weights, blended towards their ternary form; ``[..., d_out, d_in]`` -> same."""
    if blend == 0:
        return latent
    return quantize_ternary(latent.flatten(0, -2), blend, scale).view_as(latent)
