"""What a feed-forward block computes, as data: matrices, activation, dropout.

Everything that `swap/` learns about a block, by a probe, an adapter or a user's description, ends
in one `FeedForward`. It is also the reference the new layer is compared with.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.swap.activations import Activation, activation_function


class NotFeedForwardError(Exception):
    """A module is not a feed-forward block; the text is the reason, for the user."""


class UnreadableError(Exception):
    """A module is a feed-forward block whose weights cannot be read; the text says why."""


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
