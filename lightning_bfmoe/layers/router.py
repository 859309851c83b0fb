"""The router: which experts a token visits, its balance, and its auxiliary losses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.functional.routing import (
    balance_step,
    expert_load,
    route_top_k,
    switch_loss,
    z_loss,
)
from lightning_bfmoe.layers.precision import KeepsFloat32


class Routing(NamedTuple):
    """What the router decided in one forward pass."""

    experts: Tensor  # (tokens, k) int64
    weights: Tensor  # (tokens, k) float32, sums to 1
    probs: Tensor  # (tokens, experts) float32
    load: Tensor  # (experts,) int64
    loss: Tensor | None  # 0-d weighted auxiliary loss; None when there is none

    def detach(self) -> "Routing":
        """The same record without its graph."""
        loss = None if self.loss is None else self.loss.detach()
        return Routing(self.experts, self.weights.detach(), self.probs.detach(), self.load, loss)


class TopKRouter(KeepsFloat32):
    r"""logits = W x in float32; top-k of sigmoid(logits) + balance bias; softmax over the chosen.

    Args:
        d_model: Width of a token.
        num_experts: Experts.
        top_k: Experts a token.
        balance_rate: Step u of the balance bias, on scores in (0, 1); 0 turns it off.
        switch_weight: Weight of the Switch loss.
        z_weight: Weight of the z-loss.
        noise: Standard deviation of the noise on the logits in training (logit units).
        generator: Draws W from N(0, 0.02^2).
        device: Where parameters live.

    Source: `functional.routing` names the paper of each part.
    """

    balance_bias: Tensor
    _plain_tensors = ("_loss_scale", "_pending_load")

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        balance_rate: float = 1e-3,
        switch_weight: float = 0.0,
        z_weight: float = 0.0,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.balance_rate = num_experts, top_k, balance_rate
        self.switch_weight, self.z_weight, self.noise = switch_weight, z_weight, noise
        weight = 0.02 * torch.randn(num_experts, d_model, generator=generator, dtype=torch.float32)
        self.weight = nn.Parameter(weight.to(device))  # (experts, d_model)
        self.register_buffer("balance_bias", torch.zeros(num_experts, device=device))
        self._loss_scale = torch.ones((), device=self.weight.device)
        self._pending_load = torch.zeros(num_experts, dtype=torch.int64, device=self.weight.device)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (tokens, d_model)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (tokens, experts)
            if self.training and self.noise > 0:
                logits = logits + self.noise * torch.randn_like(logits)
            choice = route_top_k(logits, self.top_k, self.balance_bias)
            load = expert_load(choice.experts, self.num_experts)
            loss = None
            if self.training and torch.is_grad_enabled():
                self._pending_load += load
                loss = self._auxiliary_loss(choice.probs, choice.experts, logits)
        return Routing(choice.experts, choice.weights, choice.probs, load, loss)

    def _auxiliary_loss(self, probs: Tensor, experts: Tensor, logits: Tensor) -> Tensor | None:
        terms = []
        if self.switch_weight > 0:
            terms.append(self.switch_weight * switch_loss(probs, experts))
        if self.z_weight > 0:
            terms.append(self.z_weight * z_loss(logits))
        return sum(terms) if terms else None  # type: ignore[return-value]

    @property
    def loss_scale(self) -> Tensor:
        """0-d factor of the auxiliary losses, read when the backward pass runs."""
        return self._loss_scale

    def set_loss_scale(self, value: float) -> None:
        """Set the factor in place: a GradScaler's scale / the accumulated micro-batches."""
        self._loss_scale.fill_(float(value))

    @property
    def pending_load(self) -> Tensor:
        """Slots per expert since the last `update_balance`, (experts,) int64."""
        return self._pending_load

    @torch.no_grad()
    def update_balance(self) -> None:
        """Move the balance bias once, by the load of all training passes since the last call.

        Call it after `optimizer.step()`; `ButterflyMoECallback` does.
        """
        if self.balance_rate > 0 and bool(self._pending_load.any()):
            bias = balance_step(self.balance_bias, self._pending_load, self.balance_rate)
            self.balance_bias.copy_(bias - bias.mean())
        self._pending_load.zero_()

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}"
