"""Matrices of foreign models: which modules are one, and whether their weights can be read."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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


def unreadable(tensors: Mapping[str, Tensor]) -> str | None:
    """Why weights cannot be taken over, as "invariant: got value. way out", or None.

    Args:
        tensors: Weights by a name for the message.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.UninitializedParameter):
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
