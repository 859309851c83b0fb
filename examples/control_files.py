"""The controls' bytes: counted by arithmetic, and written to real files that load again.

A file is safetensors and holds the whole model. A ternary matrix is stored as ``NAME.trits`` (5
trits a byte) and ``NAME.scale`` (fp32, one per row); everything else is stored as it is, fp32.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.controls import StandardMoE, TernaryFeedForward
from lightning_bfmoe.functional.packing import pack_trits, packed_size, unpack_trits
from lightning_bfmoe.functional.ternary import ternarize


def ternary_names(model: nn.Module) -> dict[str, str]:
    """State-dict names of the matrices that are stored ternary, and their kind of scale."""
    return {
        f"{prefix}.{name}".removeprefix("."): module.scale
        for prefix, module in model.named_modules()
        if isinstance(module, TernaryFeedForward) or getattr(module, "ternary", False)
        for name in ("up", "down")
    }


def count_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of a module in its file, by arithmetic; headers not included.

    A parameter that stands in two places (tied) counts once.

    Example:
        >>> count_bytes(nn.Linear(10, 4))
        176
    """
    names, total = ternary_names(module), 0
    for name, tensor in module.named_parameters():
        if name in names:
            total += packed_size(tensor.numel()) + 4 * (tensor.numel() // tensor.shape[-1])
        else:
            total += 4 * tensor.numel()
    return total


def feed_forward_bytes(model: nn.Module) -> int:
    """`count_bytes` over the feed-forward part (``blocks[i].mlp``) of a GPT."""
    return sum(count_bytes(block.mlp) for block in model.blocks)


def header_bytes(path: Path) -> int:
    """Bytes of a safetensors file that are not tensors: 8 for the length, and the JSON header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def write_model(model: nn.Module, path: Path) -> int:
    """Write every parameter to one file, ternary where the model is; returns the file's bytes."""
    names, tensors = ternary_names(model), {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name in names:
            trits, alpha = ternarize(value.flatten(0, -2), names[name])
            tensors[f"{name}.trits"] = pack_trits(trits)
            tensors[f"{name}.scale"] = alpha
        else:
            tensors[name] = value.clone()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
    return path.stat().st_size


def read_model(model: nn.Module, path: Path) -> nn.Module:
    """Fill a model of the same structure from `write_model`'s file, ternary weights unpacked.

    The blend is set to 0: the numbers read are already ternary.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_stored(tensors, name, parameter.shape))
    for module in model.modules():
        if isinstance(module, TernaryFeedForward | StandardMoE):
            module.blend = 0.0
    return model


def _stored(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name in tensors:
        return tensors[name]
    trits = unpack_trits(tensors[f"{name}.trits"], shape)
    scale = tensors[f"{name}.scale"].view(*shape[:-1], 1)
    return scale * trits
