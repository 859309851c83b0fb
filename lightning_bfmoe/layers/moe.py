"""`ButterflyMoE`: the layer that stands where a feed-forward block stood."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.layers.aux_loss import attach_loss
from lightning_bfmoe.layers.correction import LowRankCorrection
from lightning_bfmoe.layers.experts import ButterflyExperts, experts_arguments
from lightning_bfmoe.layers.precision import KeepsFloat32
from lightning_bfmoe.layers.router import Routing, TopKRouter
from lightning_bfmoe.layers.state import RemembersSettings
from lightning_bfmoe.layers.substrate import is_exporting


class ButterflyMoE(RemembersSettings, KeepsFloat32):
    r"""Mixture of N experts that are learned butterfly rotations of one shared ternary matrix.

    .. math:: y = \sum_{i \in S(x)} w_i(x)\, f_i(x)\; [+\, V (U x + c)] ,\qquad \sum_i w_i(x) = 1

    A drop-in feed-forward block: any leading axes, same width out as in. Identical experts give the
    dense network for every routing, so a swap can preserve the function. Auxiliary losses act from
    inside (`layers.aux_loss`); nothing is added to the user's loss.

    Example:
        >>> layer = ButterflyMoE(16, 64, num_experts=4, top_k=2)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
        >>> layer.last_routing.load.sum().item()
        20

    Args:
        d_model: Width of a token, >= 2.
        d_ff: Hidden width, >= 2.
        num_experts: Experts, >= 1.
        top_k: Experts a token.
        balance_rate: Step of the gradient-free balance bias, on scores in (0, 1).
        switch_weight: Weight of the Switch loss (loss units).
        z_weight: Weight of the router z-loss (loss units).
        router_noise: Standard deviation of the logit noise in training (logit units).
        correction_rank: Rank of a `LowRankCorrection` beside the experts; 0 for none.
        seed: Seed of the layer's own generator.
        device: Where parameters live.
        **experts: Further settings of `ButterflyExperts`: d_out, activation, gated, bias, dropout,
            gains, stages, angle_std, scale, granularity, down, activation_bits.

    Raises:
        ConfigError: A size or setting is out of range.

    Source: arXiv 2601.13563; what differs from its published code stands in docs/decisions.md.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        balance_rate: float = 1e-3,
        switch_weight: float = 0.0,
        z_weight: float = 0.0,
        router_noise: float = 0.0,
        correction_rank: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        **experts: Any,
    ) -> None:
        super().__init__()
        ButterflyMoEConfig(  # checks the ranges
            num_experts=num_experts, top_k=top_k, balance_rate=balance_rate,
            switch_weight=switch_weight, z_weight=z_weight, router_noise=router_noise,
            correction_rank=correction_rank,
        )  # fmt: skip
        self.experts = ButterflyExperts(
            d_model, d_ff, num_experts, seed=seed, device=device, **experts
        )
        generator = torch.Generator().manual_seed(seed + 1)  # not the experts' stream
        self.router = TopKRouter(
            d_model, num_experts, top_k, balance_rate=balance_rate, switch_weight=switch_weight,
            z_weight=z_weight, noise=router_noise, generator=generator, device=device,
        )  # fmt: skip
        self.d_model, self.d_ff, self.d_out = d_model, d_ff, self.experts.d_out
        self.correction: LowRankCorrection | None = None
        if correction_rank:
            self.correction = LowRankCorrection(
                d_model, self.d_out, correction_rank, generator=generator, device=device
            )
        self.settings = {
            **self.experts.settings, "top_k": top_k, "balance_rate": balance_rate,
            "switch_weight": switch_weight, "z_weight": z_weight, "router_noise": router_noise,
            "correction_rank": correction_rank,
        }  # fmt: skip
        self.last_routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d_model) to (..., d_out), in the dtype of `x`.

        `last_routing` then holds the detached routing record of this pass.

        Raises:
            ShapeError: The last axis is not d_model.
        """
        if x.shape[-1] != self.d_model:
            raise ShapeError(
                f"the last axis of the input is d_model={self.d_model}",
                got=tuple(x.shape),
                fix="Check which block this layer replaced.",
            )
        tokens = x.reshape(-1, self.d_model)  # (tokens, d_model)
        routing = self.router(tokens)
        if not is_exporting():  # a traced tensor holds no numbers
            self.last_routing = routing.detach()
        y = self.experts(tokens, routing.experts, routing.weights)  # (tokens, d_out)
        if self.correction is not None:
            y = y + self.correction(tokens)
        if routing.loss is not None:
            y = attach_loss(y, routing.loss, self.router.loss_scale)
        return y.reshape(*x.shape[:-1], self.d_out)

    @property
    def blend(self) -> float:
        """Lambda: 0 computes with the latent weights, 1 with the ternary ones."""
        return self.experts.blend

    def set_blend(self, value: float) -> None:
        """Set lambda in place, without a recompilation."""
        self.experts.set_blend(value)

    def load_dense_(
        self, up: Tensor, down: Tensor, gate: Tensor | None = None, **biases: Any
    ) -> "ButterflyMoE":
        """Take over a dense feed-forward network, see `ButterflyExperts.load_dense_`."""
        self.experts.load_dense_(up, down, gate, **biases)
        return self

    @classmethod
    def from_config(
        cls, config: ButterflyMoEConfig, d_model: int, d_ff: int, **block: Any
    ) -> "ButterflyMoE":
        """Build from a config and what the swapped block dictates.

        `block` may hold activation, gated, bias, dropout, d_out, device.
        """
        return cls(
            d_model, d_ff, config.num_experts, config.top_k,
            balance_rate=config.balance_rate_or_default, switch_weight=config.switch_weight,
            z_weight=config.z_weight, router_noise=config.router_noise,
            correction_rank=config.correction_rank, **experts_arguments(config, block),
        )  # fmt: skip

    @classmethod
    def from_settings(
        cls,
        settings: dict[str, Any],
        *,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        **other: Any,
    ) -> "ButterflyMoE":
        """Rebuild from `settings`; give the activation when its name there is `custom`."""
        return cls(
            **{**settings, **({} if activation is None else {"activation": activation}), **other}
        )
