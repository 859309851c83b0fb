"""`pack`: a trained, swapped model becomes one small file."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe import __version__
from lightning_bfmoe.deploy.checks import refuse
from lightning_bfmoe.deploy.coding import NAMES, encoding_of
from lightning_bfmoe.deploy.example import record_example
from lightning_bfmoe.deploy.format import ENCODINGS, Header, LayerRecord, write_packed
from lightning_bfmoe.deploy.freeze import custom_tensors, describe, pack_tensors, stored_tensors
from lightning_bfmoe.deploy.report import PackReport
from lightning_bfmoe.deploy.slots import check_plain, extra_states, identity_of, slots, unwrap
from lightning_bfmoe.deploy.writer import check_target
from lightning_bfmoe.errors import ConfigError, PackedFileError, SwapError
from lightning_bfmoe.layers import CUSTOM, ButterflyExperts, ButterflyMoE, Substrate, moe_layers
from lightning_bfmoe.layers.surgery import ReplacementPlan, check_form, rebase

Layer = ButterflyMoE | ButterflyExperts


def pack(
    model: nn.Module,
    path: str | Path,
    *,
    angles: str | None = None,
    gains: str | None = None,
    rest: str = "keep",
    bits: str = "1.6",
    overwrite: bool = False,
    finalize: bool = False,
    example: Tensor | Sequence[Tensor] | None = None,
) -> PackReport:
    """Writes a model with ButterflyMoE layers into one packed file.

    Every shared matrix is stored as trits and row scales, angles and gains as asked, all else as it
    is or in bfloat16. The model is not touched. `load_packed` brings back a model that computes,
    bit for bit, what this one computes at lambda 1 with its numbers rounded so. A model that came
    from a packed file gives the same bytes again: its codes are kept, not made anew.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(ButterflyMoE(16, 64, num_experts=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = pack(model, Path(folder) / "model.bfmoe")
        >>> report.layers[0].parts["angles"]
        3584

    Args:
        model: Any module that holds at least one `ButterflyMoE` or `ButterflyExperts`.
        path: The new file; by convention it ends in `.bfmoe`.
        angles: `fp16`, `int8`, `int4` (a scale per stage of each expert) or `fp32`. None: as the
            layer holds them when it came from a file, else fp16.
        gains: `fp16`, `int8` (a scale per expert and side) or `fp32`. None: as the layer holds them
            when they are codes, `fp32` beside angles in fp32, else fp16. The factors of a low-rank
            correction are fp32 beside angles in fp32, else fp16.
        rest: `keep`, or `bf16`: the router's weight and all floating-point numbers outside the
            layers in bfloat16. The loaded model computes so (its router in float32);
            `loaded.float()` widens it.
        bits: `1.6` (five trits a byte) or `2` (four, faster to unpack).
        overwrite: Replace an existing file.
        finalize: Pack a layer whose lambda is below 1 as if it were 1.
        example: Input of the model (a tensor, or several in order). The packed model's output for
            it is recorded, for `verify_packed`; both are stored.

    Returns:
        Sizes part by part, counted and on disk, with standard MoEs of the same sizes beside them.

    Raises:
        ConfigError: `angles`, `gains`, `rest` or `bits` is none of the above.
        PackedFileError: The file exists; there is no layer to pack; a lambda is below 1; a number
            is NaN; a tensor has no ordinary values. Nothing is written then.
    """
    path = Path(path)
    check_choices(angles, gains, rest, bits)
    check_target(path, overwrite)
    if example is not None:
        settings: dict[str, Any] = {"angles": angles, "gains": gains, "rest": rest, "bits": bits}
        with tempfile.TemporaryDirectory(prefix="bfmoe-") as folder:
            inner = Path(folder) / "model.bfmoe"
            pack(model, inner, finalize=finalize, **settings)
            recorded, names = record_example(model, inner, example)
    else:
        recorded, names = {}, None
    model = unwrap(model)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, str | None]] = {}
    records: list[LayerRecord] = []
    memo: dict[tuple[int, str], Tensor] = {}
    narrowed: dict[tuple[object, ...], Tensor] = {}
    layers = dict(moe_layers(model))
    for name, layer in layers.items():
        _check_lambda(name, layer, finalize)
        chosen = choose_encodings(layer, angles, gains, rest)
        record = describe(name, layer, _placement(name, layer), bits, *chosen)
        records.append(record)
        wanted = stored_tensors(record)
        own = pack_tensors(layer, record, memo)
        if record.config["activation"] == CUSTOM:
            own |= {key: check_plain(key, item) for key, item in custom_tensors(record, layer)}
        for key, tensor in own.items():
            full = f"{name}.{key}" if name else key
            tensors[full] = tensor
            parts[full] = (wanted[key].part if key in wanted else "other", name)
    if not layers:
        raise PackedFileError(
            "a packed model holds at least one ButterflyMoE layer",
            got=f"{type(model).__name__} without one",
            fix="Call swap_feed_forward(model) and train, or use torch.save for a dense model.",
        )
    for slot in slots(model, without=layers.values()):
        tensors[slot.name] = check_plain(slot.name, slot.tensor)
        if rest == "bf16":
            tensors[slot.name] = _narrow(tensors[slot.name], narrowed)
        parts[slot.name] = ("other", None)
    tensors, aliases = _share(tensors)
    tensors |= recorded
    parts |= dict.fromkeys(recorded, ("example", None))
    extra = extra_states(model, without=layers.values())
    library, init = f"lightning-bfmoe {__version__}", init_arguments(model)
    header = Header({}, records, aliases, extra, library, init, names)
    size, header = write_packed(path, tensors, parts, header, overwrite=overwrite)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return PackReport.of(path, size, header, sizes)


def check_choices(angles: str | None, gains: str | None, rest: str, bits: str) -> None:
    """Raises `ConfigError` for an encoding that `pack` does not know."""
    choices = {
        "angles": (angles, (None, *NAMES)),
        "gains": (gains, (None, *(n for n in NAMES if NAMES[n] in ENCODINGS["gains"]))),
        "rest": (rest, ("keep", "bf16")),
        "bits": (bits, ENCODINGS["bits"]),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(
                f"{name} must be one of {known}", got=repr(value), fix=f"Use {known[-1]!r}."
            )


def choose_encodings(
    layer: Layer, angles: str | None, gains: str | None, rest: str
) -> tuple[str, str, str, str]:
    """Encodings of a layer's angles, gains, router and correction in the words of its record."""
    held = encoding_of(layer)
    chosen = held[0] if angles is None else NAMES[angles]
    beside = "float32" if chosen == "float32" else "float16"
    kept = held[1] if held[1] == "int8" else beside
    router = "bfloat16" if rest == "bf16" else "float32"
    return chosen, kept if gains is None else NAMES[gains], router, beside


def init_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of the model's class, as `save_hyperparameters` keeps them; those that are JSON."""
    found: Any = getattr(model, "hparams", None)
    result = {}
    for name, value in found.items() if isinstance(found, Mapping) else ():
        try:
            plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            continue
        if plain and isinstance(name, str):
            result[name] = value
    return result


def _check_lambda(name: str, layer: Layer, finalize: bool) -> None:
    blends = [float(m.blend) for m in layer.modules() if isinstance(m, Substrate)]
    if not finalize and blends and min(blends) < 1:
        refuse(
            "a layer is packed at blend (lambda) 1, when it computes with its ternary matrix",
            f"{name!r} at {min(blends):.4g}",
            "Pack a model from after the end of its plan. A checkpoint that validation chose can "
            "be older: choose it with ButterflyMoECallback(evaluate_ternary=True), then "
            "finalize=True packs what was validated; else it packs another function than this.",
        )


def _placement(name: str, layer: Layer) -> ReplacementPlan | None:
    if layer.placement is None or not name:
        return None
    try:
        return rebase(check_form(layer.placement), name)
    except SwapError as error:
        raise PackedFileError("a layer's placement must fit the model", got=error) from error


def _share(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and the further names."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(identity_of(tensor), name)
        if owner != name:
            aliases[name] = owner
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _narrow(tensor: Tensor, memo: dict[tuple[object, ...], Tensor]) -> Tensor:
    """In bfloat16 if it holds wider floating-point numbers; tied tensors stay tied."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    return memo.setdefault(identity_of(tensor), tensor.to(torch.bfloat16))
