"""`pack`: a trained, swapped model becomes one small file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bfmoe import __version__
from lightning_bfmoe.deploy.checks import refuse
from lightning_bfmoe.deploy.format import Header, LayerRecord, write_packed
from lightning_bfmoe.deploy.freeze import custom_tensors, describe, pack_tensors, stored_tensors
from lightning_bfmoe.deploy.report import PackReport
from lightning_bfmoe.deploy.slots import check_plain, extra_states, identity_of, slots
from lightning_bfmoe.deploy.writer import check_target
from lightning_bfmoe.errors import ConfigError, PackedFileError, SwapError
from lightning_bfmoe.layers import CUSTOM, ButterflyExperts, ButterflyMoE, Substrate, moe_layers
from lightning_bfmoe.layers.surgery import ReplacementPlan, check_form, rebase

Layer = ButterflyMoE | ButterflyExperts


def pack(
    model: nn.Module,
    path: str | Path,
    *,
    angle_dtype: torch.dtype = torch.float16,
    bits: str = "1.6",
    overwrite: bool = False,
    finalize: bool = False,
) -> PackReport:
    """Writes a model with ButterflyMoE layers into one packed file.

    Every shared matrix is stored as trits and row scales, the angles and gains in `angle_dtype`,
    all else as it is. The model is not touched. `load_packed` brings back a model that computes,
    bit for bit, what this one computes at lambda 1 with its angles and gains rounded so.

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
        angle_dtype: `torch.float16` or `torch.float32`.
        bits: `1.6` (five trits a byte) or `2` (four, faster to unpack).
        overwrite: Replace an existing file.
        finalize: Pack a layer whose lambda is below 1 as if it were 1.

    Returns:
        Sizes part by part, counted and on disk, with standard MoEs of the same sizes beside them.

    Raises:
        ConfigError: `angle_dtype` or `bits` is none of the above.
        PackedFileError: The file exists; there is no layer to pack; a lambda is below 1; a number
            is NaN; a tensor has no ordinary values. Nothing is written then.
    """
    path = Path(path)
    if angle_dtype not in (torch.float16, torch.float32):
        raise ConfigError(
            "angle_dtype must be float16 or float32", got=angle_dtype, fix="Use torch.float16."
        )
    if bits not in ("1.6", "2"):
        raise ConfigError("bits must be '1.6' or '2'", got=repr(bits), fix="Use bits='1.6'.")
    check_target(path, overwrite)
    model = unwrap(model)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, str | None]] = {}
    records: list[LayerRecord] = []
    memo: dict[tuple[int, str], Tensor] = {}
    layers = dict(moe_layers(model))
    for name, layer in layers.items():
        _check_lambda(name, layer, finalize)
        record = describe(name, layer, _placement(name, layer), bits, angle_dtype)
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
        parts[slot.name] = ("other", None)
    tensors, aliases = _share(tensors)
    extra = extra_states(model, without=layers.values())
    header = Header({}, records, aliases, extra, f"lightning-bfmoe {__version__}")
    size, header = write_packed(path, tensors, parts, header, overwrite=overwrite)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return PackReport.of(path, size, header, sizes)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile` wrapper, or the model itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


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
