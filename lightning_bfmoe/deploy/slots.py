"""The tensors of a model by the place where they hang, shared ones under every name.

`state_dict` hides which names are one tensor and lets modules rename keys; a packed file needs the
plain tree.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import PackedFileError


@dataclass(frozen=True)
class Slot:
    """One parameter or persistent buffer: `owner.<leaf>`, known to the root as `name`."""

    name: str
    owner: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """What hangs there now."""
        tensor: Tensor = getattr(self.owner, self.leaf)
        return tensor

    @property
    def key(self) -> tuple[int, str]:
        """The place itself, whatever path led to it."""
        return id(self.owner), self.leaf


def walk(
    model: nn.Module,
    without: Collection[nn.Module] = (),
    cut: Collection[tuple[int, str]] = (),
    prefix: str = "",
) -> Iterator[tuple[str, nn.Module]]:
    """Every module with every path that leads to it.

    Args:
        model: The root.
        without: Modules to leave out, with all below them.
        cut: Places (id of the owner, name) to leave out, with all below them.
        prefix: Path of `model`, with a dot at its end.
    """
    if any(model is module for module in without):
        return
    yield prefix.removesuffix("."), model
    for name, child in model._modules.items():
        if child is not None and (id(model), name) not in cut:
            yield from walk(child, without, cut, f"{prefix}{name}.")


def slots(
    model: nn.Module,
    without: Collection[nn.Module] = (),
    cut: Collection[tuple[int, str]] = (),
) -> Iterator[Slot]:
    """Every parameter and persistent buffer; arguments as in `walk`."""
    for path, module in walk(model, without, cut):
        kept = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        for leaf in (*module._parameters, *kept):
            if getattr(module, leaf) is not None and (id(module), leaf) not in cut:
                yield Slot(f"{path}.{leaf}" if path else leaf, module, leaf)


def identity_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor, also when they are two views of all of it."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def check_plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it is an ordinary one whose values are here.

    Raises:
        PackedFileError: It is lazy, on `meta`, sparse, sharded, or of a quantiser's own class; or
            a parameter holds NaN.
    """
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise PackedFileError(
            "a packed model holds ordinary tensors",
            got=f"{name}: {kind.__name__}, {getattr(tensor, 'layout', '')}",
            fix="Gather a sharded model, run a lazy one once, dequantise foreign weights first.",
        )
    if tensor.device.type == "meta":
        raise PackedFileError(
            "a packed model's tensors hold values",
            got=f"{name} on meta",
            fix="Load its weights before packing.",
        )
    if (
        isinstance(tensor, nn.Parameter)
        and tensor.is_floating_point()
        and bool(tensor.isnan().any())
    ):
        raise PackedFileError(
            "a packed model's parameters hold no NaN",
            got=f"{name} has {int(tensor.isnan().sum())} of {tensor.numel()}",
            fix="Find the step where training diverged; pack an earlier checkpoint.",
        )
    return tensor.detach()


def extra_states(model: nn.Module, without: Collection[nn.Module] = ()) -> dict[str, Any]:
    """The `get_extra_state` of each module that has one, which must be plain JSON.

    Raises:
        PackedFileError: A state is not plain data; packed files hold no pickle.
    """
    result = {}
    for path, module in walk(model, without):
        if not has_extra_state(module):
            continue
        state = module.get_extra_state()
        try:
            same = json.loads(json.dumps(state, allow_nan=False)) == state
        except (TypeError, ValueError):
            same = False
        if not same:
            raise PackedFileError(
                "extra state in a packed file must be plain JSON data (there is no pickle)",
                got=f"{path}: {type(state).__name__}",
                fix="Return dicts, lists, text, numbers, booleans or None from get_extra_state.",
            )
        result[path] = state
    return result


def has_extra_state(module: nn.Module) -> bool:
    """Whether the module's class keeps state besides its tensors."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile` wrapper, or the model itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner
