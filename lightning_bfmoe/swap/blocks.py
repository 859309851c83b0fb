"""What a feed-forward block computes, as data: matrices, activation, dropout.

Everything that `swap/` learns about a block, by a probe, an adapter or a user's description, ends
in one `FeedForward`. It is also the reference the new layer is compared with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers.activation import ACTIVATIONS

Activation = str | Callable[[Tensor], Tensor]


@dataclass
class FeedForward:
    r"""The matrices of one feed-forward block, views of its parameters in ``[out, in]`` order.

    .. math:: y = W_{down}\,a(W_{up} x + b_{up}) + b_{down} \qquad\text{or, gated,}\qquad
       y = W_{down}\big(a(W_{gate} x + b_{gate}) \odot (W_{up} x + b_{up})\big) + b_{down}

    Example:
        >>> block = FeedForward(up=torch.ones(8, 4), down=torch.ones(4, 8), activation="relu")
        >>> block.d_model, block.d_ff, block.d_out, block(torch.ones(2, 4)).shape
        (4, 8, 4, torch.Size([2, 4]))

    Args:
        up: ``[d_ff, d_model]``.
        down: ``[d_out, d_ff]``.
        gate: ``[d_ff, d_model]`` of a gated block.
        up_bias: ``[d_ff]``.
        gate_bias: ``[d_ff]``.
        down_bias: ``[d_out]``.
        activation: A name of `layers.activation`, or any elementwise callable or module.
        dropout: Probability on the hidden units.
        output_dropout: Probability on the output.
        activation_at: Where in the block an activation stands that has no name (dotted path).

    Raises:
        SwapError: The shapes do not chain.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = "gelu"
    dropout: float = 0.0
    output_dropout: float = 0.0
    activation_at: str | None = None

    def __post_init__(self) -> None:
        """Drop gradients, and check that d_model -> d_ff -> d_out chains."""
        for role, tensor in self.tensors().items():
            setattr(self, role, tensor.detach())
        shapes = {"up": self.up.shape, "down": self.down.shape}
        if self.gate is not None:
            shapes["gate"] = self.gate.shape
        fits = (
            self.up.dim() == 2 and self.down.dim() == 2 and self.down.shape[1] == self.up.shape[0]
        )
        if not fits or shapes.get("gate", self.up.shape) != self.up.shape:
            raise SwapError(
                "the matrices of a feed-forward block must chain: up and gate [d_ff, d_model], "
                "down [d_out, d_ff]",
                got=", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()),
                fix="Give weights in [out, in] order (transpose those of a Conv1D).",
            )

    @property
    def d_model(self) -> int:
        """Width of the input."""
        return self.up.shape[1]

    @property
    def d_ff(self) -> int:
        """Hidden units."""
        return self.up.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.down.shape[0]

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the hidden units."""
        return self.gate is not None

    @property
    def biases(self) -> bool:
        """Whether any of the matrices has a bias."""
        return any(b is not None for b in (self.up_bias, self.gate_bias, self.down_bias))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by role."""
        roles = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden units of `x`, after activation and gate."""
        act = activation_function(self.activation)
        up = F.linear(x, self.up, self.up_bias)
        return act(up) if self.gate is None else act(F.linear(x, self.gate, self.gate_bias)) * up

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output without dropout, in the dtype of its weights."""
        return F.linear(self.hidden(x), self.down, self.down_bias)


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The callable behind a registry name; a callable is returned as it is.

    Raises:
        SwapError: The name is unknown.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise SwapError(
            "an activation must be a callable or a known name",
            got=repr(activation),
            fix=f"Known names: {', '.join(ACTIVATIONS)}.",
        )
    return ACTIVATIONS[activation]


def activation_name(activation: Any) -> str | None:
    """The registry name of a callable that computes the same function, or None.

    Example:
        >>> activation_name(nn.GELU("tanh")), activation_name(nn.CELU(2.0))
        ('gelu_tanh', None)
    """
    grid = torch.cat([torch.linspace(-7, 7, 113), torch.tensor([-30.0, 30.0])]).double()
    try:
        wanted = activation(grid)
    except Exception:  # a foreign callable may raise anything
        return None
    for name, known in ACTIVATIONS.items():
        if torch.allclose(wanted, known(grid), rtol=1e-7, atol=1e-9):
            return name
    return None


def is_elementwise(activation: Any, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a callable maps each number by itself, so that it commutes with any reordering."""
    x = torch.linspace(-3, 3, 24, dtype=dtype, device=device)
    order = torch.arange(23, -1, -1, device=device)
    try:
        y, shuffled = activation(x.reshape(1, 4, 6)), activation(x[order].reshape(1, 2, 12))
    except Exception:  # a foreign callable may raise anything
        return False
    if not isinstance(y, Tensor) or y.shape != (1, 4, 6) or y.dtype != dtype:
        return False
    return bool(torch.allclose(y.reshape(-1)[order], shuffled.reshape(-1), rtol=1e-4, atol=1e-6))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense matrix: `nn.Linear`, or a `Conv1D` as in GPT-2 (`[in, out]`)."""
    if isinstance(module, nn.Linear):
        return True
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    return (
        isinstance(width, int)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] == width
        and not module._modules
    )


def linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight in ``[out, in]`` order and bias of a module that `is_linear` accepts, as views."""
    weight, bias = module.weight.detach(), module.bias  # type: ignore[operator,union-attr]
    if not isinstance(module, nn.Linear):
        weight = weight.t()
    return weight, None if bias is None else bias.detach()  # type: ignore[operator,union-attr]


def unreadable(tensors: dict[str, Tensor]) -> str | None:
    """Why weights cannot be taken over, as "invariant: got value. way out", or None.

    Args:
        tensors: Weights by a name for the message.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            return f"{name} is not initialised. Run one forward pass of the lazy layer first."
        if hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
            return (
                f"{name} is a DTensor. Swap before sharding: call swap_feed_forward in "
                "configure_model, before fully_shard."
            )
        if tensor.is_meta:
            return f"{name} is on the meta device. Materialise the weights, then swap."
        if not tensor.is_floating_point():
            return f"{name} is stored as {tensor.dtype}. Swap the unquantised model."
        if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
            return f"{name} holds {bad} NaN or infinite of {tensor.numel()} numbers. Repair it."
    if len(devices := {str(t.device) for t in tensors.values()}) > 1:
        return f"the block spreads over {sorted(devices)}. Put it on one device."
    return None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of `wanted`, in double; infinite when not comparable."""
    if got.shape != wanted.shape:
        return math.inf
    got, wanted = got.detach().double(), wanted.detach().double()
    error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-300))
    return math.inf if math.isnan(error) else error


def tolerance(dtype: torch.dtype) -> float:
    """Relative RMS below which two evaluations of one block in `dtype` count as the same."""
    return {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
