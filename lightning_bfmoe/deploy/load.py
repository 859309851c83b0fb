"""`load_packed`: a packed file fills a fresh model, all of it or nothing."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.format import read_packed
from lightning_bfmoe.deploy.freeze import build_packed, custom_tensors, stored_tensors
from lightning_bfmoe.deploy.match import Layer, Target, find_targets, match_tensors
from lightning_bfmoe.deploy.slots import Slot, unwrap
from lightning_bfmoe.layers import (
    CUSTOM,
    ButterflyMoE,
    CodedNumbers,
    PackedSubstrate,
    moe_layers,
)
from lightning_bfmoe.layers.surgery import Replaced, apply_replacement


@torch.inference_mode(False)  # inference tensors could not be moved, copied or trained around
def load_packed(
    path: str | Path,
    model: nn.Module,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    low_memory: bool = False,
) -> nn.Module:
    """Fills a fresh instance of the packed model's architecture, and returns it in eval mode.

    The model may still have its dense feed-forward blocks: the file says which of them become
    packed layers. Or it was swapped already, or built with `ButterflyMoE` by hand. Tensors get the
    dtype of the file. Parameters of packed layers need no gradient. Until every check has passed
    the model is not touched.

    Args:
        path: A file written by `pack`.
        model: Fresh model, on any device; also on `meta`, if it has no unsaved buffers.
        strict: Refuse a tensor that only the file or only the model's rest has; otherwise warn.
            The packed layers must fit in any case.
        device: Where the model shall go; None: tensors go where the model's are.
        low_memory: Keep the packed form alone: each use of a matrix or of coded angles unpacks it
            and throws it away. The same numbers, slower. Otherwise a packed layer keeps its dense
            matrices and decoded angles from their first use on.

    Returns:
        The same `model` object.

    Raises:
        PackedFileError: The file is damaged, foreign or newer, or does not fit the model.
    """
    file = read_packed(path)
    root = unwrap(model)
    targets = find_targets(root, file)
    match = match_tensors(file, root, targets, strict)
    tensors = file.read()
    layers = [_build(target, tensors) for target in targets]
    with ExitStack() as undo:
        for target, layer in zip(targets, layers, strict=True):
            undo.callback(_install(root, target, layer).revert)
        for group, name in match.groups:
            undo.callback(_assign(group, tensors[name], alone=name not in match.split).revert)
        for place, module in match.extra.items():
            undo.callback(module.set_extra_state, module.get_extra_state())
            module.set_extra_state(copy.deepcopy(file.header.extra_state[place]))
        undo.pop_all()  # nothing failed
    if device is not None:
        model.to(device)
    for _, layer in moe_layers(root):
        for module in layer.modules():
            if isinstance(module, PackedSubstrate | CodedNumbers):
                module.keeps = not low_memory
    return model.eval()


def _build(target: Target, tensors: dict[str, Tensor]) -> Layer:
    record = target.record
    prefix = f"{record.path}." if record.path else ""
    own = {name: tensors[prefix + name].to(target.device) for name in stored_tensors(record)}
    if record.config["activation"] != CUSTOM or target.live is None:
        return build_packed(record, own)
    experts = target.live.experts if isinstance(target.live, ButterflyMoE) else target.live
    layer = build_packed(record, own, copy.deepcopy(experts.activation.function))
    for name, tensor in custom_tensors(record, layer):
        tensor.copy_(tensors[prefix + name])
    return layer


def _install(root: nn.Module, target: Target, layer: Layer) -> Replaced:
    """Puts a packed layer in; a live layer keeps its identity and gets the packed insides."""
    if target.live is None:
        assert target.record.placement is not None
        return apply_replacement(root, target.record.placement, layer)
    inside = [(name, child) for name, child in layer._modules.items() if child is not None]
    receipt = Replaced([(target.live, name, getattr(target.live, name)) for name, _ in inside])
    for name, child in inside:
        setattr(target.live, name, child)
    return receipt


def _assign(group: list[Slot], tensor: Tensor, alone: bool) -> Replaced:
    """Hangs one tensor of the file into all its places.

    The object that hangs there is kept (an optimizer or list may know it) if it stands for this
    tensor alone; else the places get a new one.
    """
    old = group[0].tensor
    tensor = tensor.to("cpu" if old.is_meta else old.device)
    if alone and not old.is_meta and all(slot.tensor is old for slot in group):
        receipt = Replaced([(old, "data", old.data)])  # type: ignore[list-item]
        old.data = tensor
        return receipt
    new: Any = tensor
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    receipt = Replaced([(slot.owner, slot.leaf, slot.tensor) for slot in group])
    for slot in group:
        setattr(slot.owner, slot.leaf, new)
    return receipt
