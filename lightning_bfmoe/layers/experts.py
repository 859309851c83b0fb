"""The experts' feed-forward network without a router: for models that bring their own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.kernels import (
    PackedLinear,
    combine,
    dispatch_rows,
    group_by_expert,
    packed_experts,
)
from lightning_bfmoe.layers.activation import Activation
from lightning_bfmoe.layers.linear import ButterflyLinear
from lightning_bfmoe.layers.one_expert import OneExpert
from lightning_bfmoe.layers.precision import KeepsFloat32
from lightning_bfmoe.layers.state import RemembersSettings


class ButterflyExperts(RemembersSettings, KeepsFloat32):
    r"""N feed-forward experts over one ternary matrix per role, for a given choice of experts.

    .. math:: f_i(x) = W^{down}_i\, a(W^{up}_i x) ,\qquad
       f_i(x) = W^{down}_i\,(a(W^{gate}_i x) \odot W^{up}_i x)\ \text{when gated}

    Example:
        >>> experts = ButterflyExperts(16, 64, num_experts=4)
        >>> ids, weights = torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]])
        >>> experts(torch.randn(1, 16), ids, weights).shape
        torch.Size([1, 16])
        >>> len(experts), experts[2](torch.randn(5, 16)).shape
        (4, torch.Size([5, 16]))

    Args:
        d_model: Width of a token.
        d_ff: Hidden width.
        num_experts: Experts.
        d_out: Width of the output; `d_model` when None.
        activation: Name, module or function, see `layers.activation`.
        gated: Add the gate matrix.
        bias: Biases on all matrices, shared by the experts.
        dropout: Probability on the hidden units.
        gains: Per-expert diagonal gains.
        stages: Stages a rotation; all when None.
        angle_std: Standard deviation of the initial angles (radians).
        scale: Ternary scale, see `functional.ternarize`.
        granularity: `row` or `tensor`.
        down: `butterfly`, or `dense` for one shared fp32 projection (preset `paper`).
        activation_bits: Bits of the activations that enter the ternary matrices; None: no rounding.
        seed: Seed of the layer's own generator.
        device: Where parameters live.

    Source: arXiv 2601.13563; the second rotated matrix, the non-linearity and the gate ours.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 8,
        *,
        d_out: int | None = None,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        gains: bool = False,
        stages: int | None = None,
        angle_std: float = 0.5,
        scale: str = "lstsq",
        granularity: str = "row",
        down: str = "butterfly",
        activation_bits: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, d_ff=d_ff, d_out=d_model if d_out is None else d_out)
        ButterflyMoEConfig(  # checks the ranges
            num_experts=num_experts, top_k=1, angle_std=angle_std, stages=stages, scale=scale,  # type: ignore[arg-type]
            granularity=granularity, down=down, dropout=dropout, seed=seed,  # type: ignore[arg-type]
            activation_bits=activation_bits,
        )  # fmt: skip
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts
        self.d_out = d_model if d_out is None else d_out
        self.activation = Activation(activation)
        self.settings = {
            "d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "d_out": self.d_out,
            "activation": self.activation.name, "gated": gated, "bias": bias, "dropout": dropout,
            "gains": gains, "stages": stages, "angle_std": angle_std, "scale": scale,
            "granularity": granularity, "down": down, "activation_bits": activation_bits,
            "seed": seed,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        common: dict[str, Any] = {
            "bias": bias, "gains": gains, "stages": stages, "angle_std": angle_std, "scale": scale,
            "granularity": granularity, "activation_bits": activation_bits,
            "generator": generator, "device": device,
        }  # fmt: skip
        self.up = ButterflyLinear(d_model, d_ff, num_experts, **common)
        self.gate = ButterflyLinear(d_model, d_ff, num_experts, **common) if gated else None
        self.down: ButterflyLinear | nn.Linear
        if down == "butterfly":
            self.down = ButterflyLinear(d_ff, self.d_out, num_experts, **common)
        else:
            self.down = nn.Linear(d_ff, self.d_out, bias=bias, device="meta").to_empty(
                device=device or "cpu"
            )
            with torch.no_grad():
                drawn = torch.randn(self.d_out, d_ff, generator=generator) * d_ff**-0.5
                self.down.weight.copy_(drawn)
                if bias:
                    self.down.bias.zero_()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            x: Tokens, (tokens, d_model).
            experts: Chosen expert ids, (tokens, k) int64.
            weights: Their weights, (tokens, k).

        Returns:
            (tokens, d_out) in the dtype of `x`.
        """
        if x.shape[-1] != self.d_model or x.dim() != 2:
            raise ShapeError(
                f"the experts take tokens of shape (tokens, {self.d_model})",
                got=tuple(x.shape),
                fix="Flatten the leading axes first.",
            )
        packed = self._packed() if x.is_cuda else None  # no other device has a kernel for all of it
        if packed is None:
            return self._parts(x, experts, weights)
        return packed_experts(x, experts, weights, packed, self.activation.name, self._parts)

    def _packed(self) -> tuple[PackedLinear, PackedLinear | None, PackedLinear] | None:
        """The numbers of all matrices, if all are packed and nothing random stands between them."""
        if self.training and self.dropout.p > 0 or not isinstance(self.down, ButterflyLinear):
            return None
        up, down = self.up.packed_numbers(), self.down.packed_numbers()
        gate = None if self.gate is None else self.gate.packed_numbers()
        if up is None or down is None or (gate is None) != (self.gate is None):
            return None
        return up, gate, down

    def _parts(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        groups = group_by_expert(experts, self.num_experts)
        rows = dispatch_rows(x, groups, experts.shape[1])  # (rows, d_model)
        if self.gate is None:
            hidden = self.activation(self.up(rows, groups))  # (rows, d_ff)
        else:
            hidden = self.activation(self.gate(rows, groups)) * self.up(rows, groups)
        hidden = self.dropout(hidden)
        if isinstance(self.down, ButterflyLinear):
            return combine(self.down(hidden, groups), weights, groups).to(x.dtype)
        mixed = combine(hidden, weights, groups)  # linear, so it commutes with the weighted sum
        return nn.functional.linear(
            mixed,
            self.down.weight.to(mixed.dtype),
            None if self.down.bias is None else self.down.bias.to(mixed.dtype),
        ).to(x.dtype)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> OneExpert:
        """One expert as a function, as a `ModuleList` of experts would give it."""
        return OneExpert(self, range(self.num_experts)[index])

    def __iter__(self) -> Iterator[OneExpert]:
        return (self[i] for i in range(self.num_experts))

    def linears(self) -> dict[str, ButterflyLinear]:
        """The rotated matrices by role: up, gate (when gated), down (when rotated)."""
        roles = {"up": self.up, "gate": self.gate, "down": self.down}
        return {name: m for name, m in roles.items() if isinstance(m, ButterflyLinear)}

    def load_dense_(
        self,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        *,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> "ButterflyExperts":
        """Take over a dense feed-forward network, function-preserving at lambda 0 and equal angles.

        Weights are (out, in). See `ButterflyLinear.load_dense_`.

        Raises:
            ShapeError: A matrix is missing, or a shape does not fit.
        """
        if (gate is None) != (self.gate is None):
            raise ShapeError(
                "a gated layer takes a gate matrix, an ungated one none",
                got="no gate" if gate is None else f"a gate of shape {tuple(gate.shape)}",
                fix="Build the layer with the gating of the network that is loaded.",
            )
        self.up.load_dense_(up, up_bias)
        if self.gate is not None and gate is not None:
            self.gate.load_dense_(gate, gate_bias)
        if isinstance(self.down, ButterflyLinear):
            self.down.load_dense_(down, down_bias)
        else:
            with torch.no_grad():
                self.down.weight.copy_(down)
                if self.down.bias is not None and down_bias is not None:
                    self.down.bias.copy_(down_bias)
        return self

    @property
    def blend(self) -> float:
        """Lambda of all shared matrices: 0 latent, 1 ternary."""
        return float(self.up.substrate.blend)

    def set_blend(self, value: float) -> None:
        """Set lambda of all shared matrices."""
        for linear in self.linears().values():
            linear.substrate.set_blend(value)

    @classmethod
    def from_config(
        cls, config: ButterflyMoEConfig, d_model: int, d_ff: int, **block: Any
    ) -> "ButterflyExperts":
        """Build from a config and what the swapped block dictates.

        `block` may hold activation, gated, bias, dropout, d_out, device.
        """
        return cls(d_model, d_ff, config.num_experts, **experts_arguments(config, block))


def experts_arguments(config: ButterflyMoEConfig, block: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the experts: the config's, or the block's where the config says None."""
    arguments = {
        "gains": config.gains, "stages": config.stages, "angle_std": config.angle_std_or_default,
        "scale": config.scale_or_default, "granularity": config.granularity, "down": config.down,
        "activation_bits": config.activation_bits, "seed": config.seed, **block,
    }  # fmt: skip
    if config.activation is not None:
        arguments["activation"] = config.activation
    if config.dropout is not None:
        arguments["dropout"] = config.dropout
    return arguments


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 2:
            raise ConfigError(
                f"{name} must be an integer >= 2, the smallest width a butterfly rotates",
                got=f"{name}={size!r}",
                fix="Exclude this block from the swap, or widen it.",
            )
