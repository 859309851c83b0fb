"""Does a packed file fit a model? All questions of `load_packed`, asked before anything changes."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.checks import refuse
from lightning_bfmoe.deploy.container import DTYPES
from lightning_bfmoe.deploy.format import LayerRecord, PackedFile
from lightning_bfmoe.deploy.freeze import custom_tensors, same_layer, stored_tensors
from lightning_bfmoe.deploy.slots import Slot, has_extra_state, slots, walk
from lightning_bfmoe.errors import PackedFileError, SwapError
from lightning_bfmoe.layers import CUSTOM, ButterflyExperts, ButterflyMoE, moe_layers
from lightning_bfmoe.layers.surgery import find_slot

Layer = ButterflyMoE | ButterflyExperts


@dataclass(frozen=True)
class Target:
    """Where one packed layer goes."""

    record: LayerRecord
    live: Layer | None  # a ButterflyMoE that stands there already
    cut: frozenset[tuple[int, str]]  # places whose content the surgery replaces
    device: torch.device


@dataclass(frozen=True)
class Match:
    """Which place of the model takes which tensor of the file."""

    groups: list[tuple[list[Slot], str]]
    split: set[str]  # tensors of the file whose place in the model is tied to another one's
    extra: dict[str, nn.Module]


def find_targets(root: nn.Module, file: PackedFile) -> list[Target]:
    """Where each layer of the file goes.

    Raises:
        PackedFileError: The model has no such place, or another layer stands there.
    """
    modules = dict(walk(root))
    return [_find_target(root, modules, record) for record in file.header.layers]


def _find_target(root: nn.Module, modules: dict[str, nn.Module], record: LayerRecord) -> Target:
    live = modules.get(record.path)
    if isinstance(live, ButterflyMoE | ButterflyExperts):
        if different := same_layer(record, live):
            refuse("a packed layer fits a layer with the same settings", different, _SAME)
        return Target(record, live, frozenset(), _device(live))
    if record.placement is None:
        refuse(
            "a layer packed without placement needs a ButterflyMoE in its place",
            f"{record.path!r} is {type(live).__name__}",
            "Build or swap the model the way it was before packing.",
        )
    if record.config["activation"] == CUSTOM:
        refuse(
            "an activation without a name cannot be rebuilt from a file",
            record.path,
            "Swap the fresh model with the call that you used before packing, then load.",
        )
    entry = record.placement
    try:
        owned = (entry["path"], *entry["aliases"], *entry["identities"])
        places = [find_slot(root, slot) for slot in owned]
        for slot in entry["attributes"]:
            find_slot(root, slot)
    except SwapError as error:
        raise PackedFileError("a packed layer needs its place in the model", got=error) from error
    owner, name = places[0]
    old = owner._modules.get(name)
    if old is None:
        refuse("a packed layer replaces a module", record.path, _SAME)
    _check_widths(record, [owner._modules.get(name) for owner, name in places])
    cut = frozenset((id(owner), name) for owner, name in places)
    return Target(record, None, cut, _device(old))


def _check_widths(record: LayerRecord, replaced: list[nn.Module | None]) -> None:
    """The dense block that goes has matrices of the widths of the layer that comes."""
    matrices = [p for m in replaced if m is not None for p in m.parameters() if p.dim() >= 2]
    found = {size for matrix in matrices for size in matrix.shape}
    wanted = {record.config[name] for name in ("d_model", "d_ff", "d_out")}
    if matrices and not wanted <= found:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        refuse(
            f"the block at {record.path!r} has matrices of widths {sorted(wanted)}",
            f"matrices of shape {', '.join(map(str, shapes))}",
            _SAME,
        )


def match_tensors(file: PackedFile, root: nn.Module, targets: list[Target], strict: bool) -> Match:
    """Pairs every tensor and extra state of the file with its place in the model.

    Raises:
        PackedFileError: Something is left over or does not fit, see `load_packed`.
    """
    live = [target.live for target in targets if target.live is not None]
    if len({id(layer) for layer in live}) != len(live):
        refuse("every packed layer has a layer of its own", "one shared layer for two", _SAME)
    for path, layer in moe_layers(root):
        if not any(layer is other for other in live):
            refuse("every ButterflyMoE of the model is in the file", f"{path!r} is not", _SAME)
    aliases = file.header.aliases
    inside = _check_layers(file, targets)
    shown = {n for n, record in file.header.tensors.items() if record.part == "example"}
    rest = (set(file.specs) | set(aliases)) - inside - shown
    cut = frozenset[tuple[int, str]]().union(*(target.cut for target in targets))
    found = {slot.name: slot for slot in slots(root, live, cut)}
    _report("tensor", rest - set(found), set(found) - rest, strict)
    groups: dict[str, list[Slot]] = {}
    taken: dict[tuple[int, str], str] = {}
    for name in sorted(rest & set(found)):
        slot, source = found[name], aliases.get(name, name)
        spec = file.specs[source]
        if tuple(slot.tensor.shape) != spec.shape:
            got = f"{name}: model {tuple(slot.tensor.shape)}, file {spec.shape}"
            refuse("a tensor has the same shape in model and file", got, _SAME)
        if _family(slot.tensor.dtype) != _family(DTYPES[spec.dtype]):
            got = f"{name}: model {slot.tensor.dtype}, file {spec.dtype}"
            refuse("a tensor holds the same kind of numbers in model and file", got, _SAME)
        if taken.setdefault(slot.key, source) != source:
            refuse("two tensors of the file need two places", f"{name}, {taken[slot.key]}", _SAME)
        groups.setdefault(source, []).append(slot)
    _check_meta(root, live, cut, found, rest)
    modules = {p: m for p, m in walk(root, live, cut) if has_extra_state(m)}
    stored = set(file.header.extra_state)
    _report("extra state", stored - set(modules), set(modules) - stored, strict)
    extra = {path: modules[path] for path in sorted(stored & set(modules))}
    return Match([(group, name) for name, group in groups.items()], _split(groups), extra)


def _split(groups: dict[str, list[Slot]]) -> set[str]:
    users: dict[int, set[str]] = {}
    for name, group in groups.items():
        for slot in group:
            users.setdefault(id(slot.tensor), set()).add(name)
    return {name for names in users.values() if len(names) > 1 for name in names}


def _check_layers(file: PackedFile, targets: list[Target]) -> set[str]:
    """Compares the layers' tensors with their settings; returns all names that belong to layers."""
    inside: set[str] = set()
    for target in targets:
        record = target.record
        prefix = f"{record.path}." if record.path else ""
        wanted = stored_tensors(record)
        custom: dict[str, Tensor] = {}
        if record.config["activation"] == CUSTOM and target.live is not None:
            custom = dict(custom_tensors(record, target.live))
        for name in (*wanted, *custom):
            full = prefix + name
            spec = file.specs.get(file.header.aliases.get(full, full))
            if spec is None:
                refuse("a packed layer has all its tensors", f"no {full}")
            shape = wanted[name].shape if name in wanted else tuple(custom[name].shape)
            if spec.shape != shape or (name in wanted and spec.dtype not in wanted[name].dtypes):
                expected = f"{shape} {wanted[name].dtypes if name in wanted else ''}"
                refuse(
                    "a packed layer's tensors follow from its settings",
                    f"{full}: {spec.shape} {spec.dtype} instead of {expected}",
                )
            if full in inside:
                refuse("a tensor belongs to one layer", full)
            inside.add(full)
    owned = {name for name, record in file.header.tensors.items() if record.layer is not None}
    if odd := sorted(owned - inside):
        refuse("a packed layer has no further tensors", f"{len(odd)}, as {odd[0]}")
    return inside


def _check_meta(
    root: nn.Module,
    live: list[Layer],
    cut: frozenset[tuple[int, str]],
    found: dict[str, Slot],
    rest: set[str],
) -> None:
    empty = [name for name in found if found[name].tensor.is_meta and name not in rest]
    for path, module in walk(root, live, cut):
        unsaved = module._non_persistent_buffers_set
        empty += [
            f"{path}.{name}"
            for name, buffer in module._buffers.items()
            if name in unsaved and buffer is not None and buffer.is_meta
        ]
    if empty:
        refuse(
            "a model on `meta` gets every tensor from the file",
            f"{len(empty)} are not in it, as {empty[0]}",
            "Build the model on the CPU.",
        )


def _report(kind: str, only_file: set[str], only_model: set[str], strict: bool) -> None:
    if not only_file and not only_model:
        return
    got = "; ".join(
        f"{len(names)} only in the {where}: {', '.join(sorted(names)[:3])}"
        for where, names in (("file", only_file), ("model", only_model))
        if names
    )
    if strict:
        refuse(f"file and model have the same {kind}s", got, _SAME)
    warnings.warn(f"load_packed(strict=False): {kind}s {got}", stacklevel=4)


def _family(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float32
    return torch.complex64 if dtype.is_complex else dtype


def _device(module: nn.Module) -> torch.device:
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


_SAME = "Build the model with the same code and sizes as the one that was packed."
