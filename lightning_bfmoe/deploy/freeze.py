"""A layer as stored tensors, and a layer made of stored tensors; no latent weight on either side.

The stored names are the state-dict keys of the packed layer:

    router.weight, router.balance_bias                     (the router; not in ButterflyExperts)
    correction.basis / .offset / .weight                   (where the layer has a correction)
    experts.up.substrate.packed / .alpha                   trits as bytes, row scales
    experts.up.rotate_in.angles / rotate_out.angles        (experts, stages, pairs)
    experts.up.gain_in / gain_out / bias                   where the layer has them
    ... rotate_in.codes / .scales, gain_in.codes / .scales  instead, at 8 or 4 bit
    experts.gate..., experts.down...                       the same
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.checks import refuse
from lightning_bfmoe.deploy.coding import CODE_BITS, check_finite, number_tensors, stored_numbers
from lightning_bfmoe.deploy.format import LayerRecord
from lightning_bfmoe.deploy.slots import check_plain
from lightning_bfmoe.deploy.stored import FLOATS, Stored
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.functional.butterfly import num_pairs, num_stages
from lightning_bfmoe.functional.packing import packed_size
from lightning_bfmoe.layers import (
    ButterflyExperts,
    ButterflyLinear,
    ButterflyMoE,
    CodedNumbers,
    CodedRotation,
    PackedSubstrate,
    Substrate,
    TopKRouter,
)
from lightning_bfmoe.layers.surgery import ReplacementPlan

KINDS: dict[str, type[ButterflyMoE] | type[ButterflyExperts]] = {
    "ButterflyMoE": ButterflyMoE,
    "ButterflyExperts": ButterflyExperts,
}
_TRAINING = {"dropout", "scale", "angle_std", "seed", "balance_rate"}
_TRAINING |= {"switch_weight", "z_weight", "router_noise"}


def stored_tensors(record: LayerRecord) -> dict[str, Stored]:
    """Names, dtypes and shapes of a packed layer, by arithmetic alone (nothing is built).

    A custom activation's own parameters are not among them.
    """
    config, experts = record.config, record.config["num_experts"]
    d_model, d_ff, d_out = config["d_model"], config["d_ff"], config["d_out"]
    result: dict[str, Stored] = {}
    prefix = ""
    if record.kind == "ButterflyMoE":
        result["router.weight"] = Stored((_ROUTER[record.router],), (experts, d_model), "router")
        result["router.balance_bias"] = Stored(("F32",), (experts,), "router")
        prefix = "experts."
        if rank := config["correction_rank"]:
            dtype = (_CORRECTION[record.correction],)
            shapes = {"basis": (rank, d_model), "offset": (rank,), "weight": (d_out, rank)}
            for leaf, shape in shapes.items():
                kind = ("F32",) if leaf == "offset" else dtype
                result[f"correction.{leaf}"] = Stored(kind, shape, "correction")

    def add(role: str, rows: int, columns: int) -> None:
        name = f"{prefix}{role}."
        scales = rows if config["granularity"] == "row" else 1
        size = packed_size(rows * columns, record.bits)
        result[name + "substrate.packed"] = Stored(("U8",), (size,), "substrate")
        result[name + "substrate.alpha"] = Stored(("F32",), (scales, 1), "scales")
        for side, d in (("in", columns), ("out", rows)):
            angles = (experts, min(config["stages"] or d, num_stages(d)), num_pairs(d))
            place = f"{name}rotate_{side}"
            result.update(stored_numbers(place, angles, "angles", record.angles))
            if config["gains"]:
                gains = (experts, d)
                place = f"{name}gain_{side}"
                result.update(stored_numbers(place, gains, "gains", record.gains))
        if config["bias"]:
            result[name + "bias"] = Stored(("F32",), (rows,), "bias")

    add("up", d_ff, d_model)
    if config["gated"]:
        add("gate", d_ff, d_model)
    if config["down"] == "butterfly":
        add("down", d_out, d_ff)
    else:
        result[prefix + "down.weight"] = Stored(FLOATS, (d_out, d_ff), "dense")
        if config["bias"]:
            result[prefix + "down.bias"] = Stored(FLOATS, (d_out,), "bias")
    return result


def describe(
    path: str,
    layer: ButterflyMoE | ButterflyExperts,
    placement: ReplacementPlan | None,
    bits: str,
    angles: str,
    gains: str,
    router: str,
    correction: str,
) -> LayerRecord:
    """The record of a live layer.

    Raises:
        PackedFileError: The layer is of a class that `load_packed` cannot build.
    """
    kind = type(layer).__name__
    if KINDS.get(kind) is not type(layer):
        raise PackedFileError(
            f"a packed layer is one of {sorted(KINDS)}",
            got=f"{kind} at {path!r}",
            fix="Wrap the layer in a module of yours instead of subclassing it.",
        )
    settings = dict(layer.settings)
    return LayerRecord(path, kind, settings, placement, bits, angles, gains, router, correction)


def pack_tensors(
    layer: nn.Module, record: LayerRecord, memo: dict[tuple[int, str], Tensor]
) -> dict[str, Tensor]:
    """The stored tensors of a live layer, latent or already packed; the layer is not touched.

    Args:
        layer: The layer.
        record: Its record.
        memo: Filled with what was made of which module, so that shared parts stay shared.

    Raises:
        PackedFileError: A number is NaN or infinite, or does not fit the stored dtype.
    """
    result: dict[str, Tensor] = {}
    for name, stored in stored_tensors(record).items():
        if stored.part in ("angles", "gains"):
            result[name] = number_tensors(layer, record, name, stored.part, memo)
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        key = (id(owner), leaf)
        if key not in memo and isinstance(owner, Substrate | PackedSubstrate):
            if isinstance(owner, Substrate):
                check_finite(record, f"{owner_name}.latent", owner.latent)
            packed = PackedSubstrate.from_substrate(owner, record.bits)
            memo |= {(id(owner), "packed"): packed.packed, (id(owner), "alpha"): packed.alpha}
        if key not in memo:
            tensor = check_plain(f"{record.path}.{name}", getattr(owner, leaf))
            check_finite(record, name, tensor)
            if leaf == "weight" and stored.part == "router" and tensor.dtype == torch.float32:
                tensor = tensor.to(getattr(torch, record.router))
            elif stored.part == "correction":
                narrow = torch.float32 if leaf == "offset" else getattr(torch, record.correction)
                tensor = tensor.to(narrow)
            elif tensor.dtype == torch.float64:
                refuse("a layer is packed from float32", f"{record.path}.{name} in float64", _FLOAT)
            memo[key] = tensor
        check_finite(record, name, memo[key])
        result[name] = memo[key]
    return result


def build_packed(
    record: LayerRecord,
    tensors: dict[str, Tensor],
    activation: Callable[[Tensor], Tensor] | None = None,
) -> ButterflyMoE | ButterflyExperts:
    """A packed layer around the stored tensors, which it uses as they are.

    Args:
        record: Its record.
        tensors: Every name of `stored_tensors`.
        activation: Module or function for an activation named `custom`.

    Raises:
        PackedFileError: The settings make no layer, or the trits are no code.
    """
    settings: dict[str, Any] = {**record.config, "device": "meta"}
    if activation is not None:
        settings["activation"] = activation
    try:
        # On `meta` nothing is allocated and no random number is drawn, in the constructors too.
        with torch.device("meta"):
            layer = KINDS[record.kind](**settings)
    except Exception as error:  # whatever a forged setting provokes
        raise PackedFileError(
            "a packed layer's settings must make a layer", got=f"{record.path}: {error}"
        ) from error
    for module in list(layer.modules()):
        if isinstance(module, ButterflyLinear):
            module.substrate = _empty_substrate(module.d_out, module.d_in, record)
            _make_room(module, record)
    for name, stored in stored_tensors(record).items():
        owner_name, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        tensor = tensors[name].float() if stored.part == "router" else tensors[name]
        _put(owner, leaf, tensor, frozen=stored.part in ("angles", "gains"))
    for module in layer.modules():
        if isinstance(module, PackedSubstrate):
            module.ternary()  # raises unless every byte is a code
        elif isinstance(module, CodedNumbers):
            module.check()
        elif isinstance(module, TopKRouter):
            module.start_counting()
    return layer


def same_layer(record: LayerRecord, layer: ButterflyMoE | ButterflyExperts) -> str:
    """What keeps a live layer from being the recorded one; empty when nothing does."""
    if type(layer).__name__ != record.kind:
        return f"{type(layer).__name__}, not {record.kind}"
    live = layer.settings
    different = [
        f"{name}: model {live.get(name)!r}, file {value!r}"
        for name, value in record.config.items()
        if name not in _TRAINING and live.get(name) != value
    ]
    return ", ".join(different)


def custom_tensors(record: LayerRecord, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a layer's custom activation, by name."""
    prefix = "experts." if record.kind == "ButterflyMoE" else ""
    for name, tensor in layer.get_submodule(prefix + "activation").state_dict().items():
        yield f"{prefix}activation.{name}", tensor


def _make_room(linear: ButterflyLinear, record: LayerRecord) -> None:
    """Coded angles and gains in the places of the float ones; their bytes come later."""
    for name, encoding in (("rotate", record.angles), ("gain", record.gains)):
        for place in (f"{name}_in", f"{name}_out"):
            old = getattr(linear, place)
            if encoding not in CODE_BITS or old is None:
                continue
            bits = CODE_BITS[encoding]
            if isinstance(old, Tensor):
                delattr(linear, place)
                setattr(linear, place, CodedNumbers(tuple(old.shape), bits, 1.0, "meta"))
            else:
                setattr(linear, place, CodedRotation(tuple(old.angles.shape), bits, 0.0, "meta"))


def _empty_substrate(d_out: int, d_in: int, record: LayerRecord) -> PackedSubstrate:
    packed = PackedSubstrate(2, 2, record.bits, record.config["granularity"])
    packed.d_out, packed.d_in = d_out, d_in  # the stored bytes follow, and fit these sizes
    return packed


def _put(owner: nn.Module, name: str, tensor: Tensor, frozen: bool) -> None:
    if name in owner._buffers:
        owner._buffers[name] = tensor
    elif frozen:
        delattr(owner, name)
        owner.register_buffer(name, tensor)
    else:
        setattr(owner, name, nn.Parameter(tensor, requires_grad=False))


_ROUTER = {"float32": "F32", "bfloat16": "BF16"}
_CORRECTION = {"float16": "F16", "float32": "F32"}
_FLOAT = "Call model.float() before packing."
