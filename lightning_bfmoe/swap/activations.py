"""Activations of foreign blocks: which callables are one, and what their name is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers.activation import ACTIVATIONS
from lightning_bfmoe.swap.linears import is_linear
from lightning_bfmoe.swap.quiet import quiet

Activation = str | Callable[[Tensor], Tensor]


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
    grid = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
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


def own_activations(block: nn.Module) -> dict[str, Activation]:
    """Activations that the block itself carries, as modules or as callable attributes.

    Returns:
        By dotted path: the registry name of a known function, or the callable itself.
    """
    found: dict[str, Activation] = {}
    weight = next(
        (p for p in block.parameters() if p.is_floating_point()),
        torch.zeros((), dtype=torch.float32, device="cpu"),
    )
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        things: dict[str, Any] = {path: module} if path else {}
        things |= {
            prefix + key: value
            for key, value in vars(module).items()
            if callable(value)
            and not key.startswith("_")
            and not isinstance(value, type | nn.Module)
        }
        for where, thing in things.items():
            if any(where.startswith(f"{outer}.") for outer in found):
                continue  # a part of an activation
            if (known := classify_activation(thing, weight)) is not None:
                found[where] = known
    return found


def classify_activation(thing: Any, weight: Tensor) -> Activation | None:
    """The registry name of an elementwise callable, itself when unnamed, None for anything else."""
    if isinstance(thing, nn.Module) and (
        isinstance(thing, nn.Dropout | nn.Identity | nn.ModuleList | nn.ModuleDict)
        or any(is_linear(part) for part in thing.modules())
    ):
        return None
    with quiet(thing if isinstance(thing, nn.Module) else nn.Identity()):
        if not is_elementwise(thing, weight.dtype, weight.device):
            return None
        return activation_name(thing) or thing
