"""Activations by name, so that a layer's settings are plain data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.errors import ConfigError

CUSTOM = "custom"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "relu2": _relu2,
    "quick_gelu": _quick_gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "identity": _identity,
}
"""Name -> function. Any other callable or module can be given itself; its name is `custom`."""


class Activation(nn.Module):
    """An activation that knows its name.

    Example:
        >>> Activation("relu2")(torch.tensor([-1.0, 3.0])).tolist()
        [0.0, 9.0]

    Args:
        activation: A name in `ACTIVATIONS`, or a module (its parameters train with the layer), or
            any function of one tensor.

    Raises:
        ConfigError: Unknown name.
    """

    def __init__(self, activation: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name: str
        self.function: Callable[[Tensor], Tensor] | None
        if isinstance(activation, Activation):
            activation = activation.name if activation.function is None else activation.function
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ConfigError(
                    f"an activation is one of {tuple(ACTIVATIONS)}, or a callable",
                    got=repr(activation),
                    fix="Pass the module or function itself.",
                )
            self.name, self.function = activation, None
        else:
            self.name, self.function = CUSTOM, activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise."""
        return (self.function or ACTIVATIONS[self.name])(x)

    def extra_repr(self) -> str:
        """Name shown by `print(model)`."""
        return self.name
