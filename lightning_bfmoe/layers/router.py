"""The router: which experts a token visits, its balance, and its auxiliary losses."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_bfmoe.functional.noise import counter_noise
from lightning_bfmoe.functional.routing import (
    balance_step,
    switch_loss,
    z_loss,
)
from lightning_bfmoe.kernels import route, router_logits
from lightning_bfmoe.layers.passes import count_load, is_counted
from lightning_bfmoe.layers.precision import KeepsFloat32


class Routing(NamedTuple):
    """What the router decided in one forward pass."""

    experts: Tensor  # (tokens, k) int64
    weights: Tensor  # (tokens, k) float32, sums to 1
    probs: Tensor  # (tokens, experts) float32
    load: Tensor  # (experts,) int64, without tokens whose logits are NaN or infinite
    loss: Tensor | None  # 0-d weighted auxiliary loss; None when there is none

    def detach(self) -> "Routing":
        """The same record without its graph."""
        loss = None if self.loss is None else self.loss.detach()
        return Routing(self.experts, self.weights.detach(), self.probs.detach(), self.load, loss)


class TopKRouter(KeepsFloat32):
    r"""logits = W x in float32; top-k of sigmoid(logits) + balance bias; softmax over the chosen.

    The balance bias follows the load of the passes that are trained on (`layers.passes`), unless
    W is frozen (``requires_grad_(False)``): then the routing of the layer stands still.

    The noise depends on the step and on the token's place in the batch only: it is drawn anew by
    each `update_balance`, moves no generator, and goes on exactly after a checkpoint.

    Args:
        d_model: Width of a token.
        num_experts: Experts.
        top_k: Experts a token.
        balance_rate: Step u of the balance bias, on scores in (0, 1); 0 turns it off.
        switch_weight: Weight of the Switch loss.
        z_weight: Weight of the z-loss.
        noise: Standard deviation of the noise on the logits in training (logit units).
        generator: Draws W from N(0, 0.02^2), and the key of the noise, which depends on the global
            seed too.
        device: Where parameters live.

    Source: `functional.routing` names the paper of each part.
    """

    balance_bias: Tensor
    noise_counter: Tensor | None
    """Key and step of the noise, (2,) int64; None without noise."""
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
        self.register_buffer("noise_counter", None)
        if noise > 0:
            key = torch.randint(2**31, (2,), generator=generator)
            key[0] ^= torch.initial_seed() % 2**31
            key[1] = 0
            self.noise_counter = key.to(device)
        self.start_counting()

    def start_counting(self) -> None:
        """Begin without a load and at loss scale 1, on the device of the parameters.

        For a router that was built on the meta device; one of an own training is born so.
        """
        device = self.weight.device
        self._loss_scale = torch.ones((), device=device)
        self._pending_load = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        if self.noise_counter is not None and self.noise_counter.is_meta:
            self.noise_counter = torch.zeros(2, dtype=torch.int64, device=device)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (tokens, d_model)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = router_logits(x, self.weight)  # (tokens, experts)
            if self.training and self.noise_counter is not None:
                noise = counter_noise(self.noise_counter, *logits.shape)
                logits = logits + self.noise * noise.to(logits.dtype)
            choice, load = route(logits, self.top_k, self.balance_bias)
            loss = None
            if self.training and torch.is_grad_enabled():
                if self.weight.requires_grad and is_counted(self):
                    count_load(self._pending_load, load)
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

    def set_loss_scale(self, value: float | Tensor) -> None:
        """Set the factor in place: a GradScaler's scale / the accumulated micro-batches.

        A 0-d tensor on the router's device is copied without a synchronisation.
        """
        if isinstance(value, Tensor):
            self._loss_scale.copy_(value)
        else:
            self._loss_scale.fill_(float(value))

    @property
    def pending_load(self) -> Tensor:
        """Slots per expert since the last `update_balance`, (experts,) int64."""
        return self._pending_load

    def update_balance(self) -> None:
        """Move the balance bias once, by the load of all training passes since the last call.

        Call it after `optimizer.step()`; `ButterflyMoECallback` does. Noise is drawn anew.
        """
        balance_together([self])

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}"


@torch.no_grad()
def balance_together(routers: Iterable[TopKRouter]) -> None:
    """Let all routers take their `update_balance`, in a few operations for all of them.

    Nothing waits for the device. A bias whose router saw no token stays as it is; otherwise its
    mean is taken out, which no choice depends on.
    """
    alike: dict[tuple[object, ...], list[TopKRouter]] = {}
    counters: dict[torch.device, list[Tensor]] = {}
    for router in routers:
        key = (router.num_experts, router.balance_rate, router.balance_bias.device,
               router.balance_bias.dtype)  # fmt: skip
        alike.setdefault(key, []).append(router)
        if router.noise_counter is not None:
            counters.setdefault(router.noise_counter.device, []).append(router.noise_counter[1])
    for group in alike.values():
        pending = [router.pending_load for router in group]
        rate = group[0].balance_rate
        if rate > 0:
            biases = [router.balance_bias for router in group]
            load, bias = torch.stack(pending), torch.stack(biases)  # (layers, experts)
            moved = balance_step(bias, load, rate)
            moved = moved - moved.mean(dim=-1, keepdim=True)
            moved = torch.where((load > 0).any(dim=-1, keepdim=True), moved, bias)
            torch._foreach_copy_(biases, list(moved.unbind()))
        torch._foreach_zero_(pending)
    for steps in counters.values():
        torch._foreach_add_(steps, 1)
