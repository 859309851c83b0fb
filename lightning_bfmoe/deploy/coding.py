"""Angles and gains of a layer in each stored encoding: floats, or codes with scales.

Scales are kept per stage of an expert's rotation, and per expert and side for gains
(`functional.codes`; `docs/decisions.md` has the measurement). Gains are coded as gain - 1.
"""

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.format import LayerRecord
from lightning_bfmoe.deploy.slots import check_plain
from lightning_bfmoe.deploy.stored import Stored
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.functional.codes import code_bytes
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, CodedNumbers

CODE_BITS = {"int8": 8, "int4": 4}
FLOAT_BITS = {"float16": 16, "float32": 32}
NAMES = {"fp16": "float16", "fp32": "float32", "int8": "int8", "int4": "int4"}
"""What `pack` is asked for -> what a layer record says."""
_DTYPES = {"float16": "F16", "float32": "F32", "int8": "I8", "int4": "U8"}


def stored_numbers(
    place: str, shape: tuple[int, ...], part: str, encoding: str
) -> dict[str, Stored]:
    """The stored tensors of one rotation's angles, or of one side's gains.

    Example:
        >>> list(stored_numbers("up.rotate_in", (4, 3, 5), "angles", "int4").values())[0].shape
        (4, 3, 3)
    """
    dtype = (_DTYPES[encoding],)
    if encoding not in CODE_BITS:
        return {f"{place}.angles" if part == "angles" else place: Stored(dtype, shape, part)}
    codes = (*shape[:-1], code_bytes(shape[-1], CODE_BITS[encoding]))
    return {
        f"{place}.codes": Stored(dtype, codes, part),
        f"{place}.scales": Stored(("F16",), shape[:-1], part),
    }


def encoding_of(layer: ButterflyMoE | ButterflyExperts) -> tuple[str, str]:
    """How a live layer holds its angles and gains; what is trained counts as float16."""
    experts = layer.experts if isinstance(layer, ButterflyMoE) else layer
    linear = experts.up
    return _encoding(linear.rotate_in), _encoding(linear.gain_in)


def number_tensors(
    layer: nn.Module,
    record: LayerRecord,
    name: str,
    part: str,
    memo: dict[tuple[int, str], Tensor],
) -> Tensor:
    """One stored tensor of angles or gains; codes that a layer already holds are taken as they are.

    Args:
        layer: The live layer.
        record: Its record.
        name: Name of the stored tensor, from `stored_numbers`.
        part: `angles` or `gains`.
        memo: What was made of which module, so that shared parts stay shared.

    Raises:
        PackedFileError: A number is NaN or infinite, or does not fit the stored dtype.
    """
    encoding = record.angles if part == "angles" else record.gains
    coded = encoding in CODE_BITS
    place, leaf = name, "float"  # of a gain; angles and codes have one leaf more
    if coded or part == "angles":
        place, _, leaf = name.rpartition(".")
    parent, _, attribute = place.rpartition(".")
    linear = layer.get_submodule(parent)
    live = getattr(linear, attribute)
    owner = live if isinstance(live, nn.Module) else linear
    prefix = "" if isinstance(live, nn.Module) else f"{attribute}."
    if (id(owner), prefix + leaf) not in memo:
        values = check_plain(f"{record.path}.{name}", _values(live))
        check_finite(record, name, values)
        if isinstance(live, CodedNumbers) and live.bits == CODE_BITS.get(encoding):
            made = {"codes": live.codes, "scales": live.scales}
        elif coded:
            angles = part == "angles"
            values = wrap_angles(values) if angles else values
            fresh = CodedNumbers.of(values, CODE_BITS[encoding], 0.0 if angles else 1.0)
            made = {"codes": fresh.codes, "scales": fresh.scales}
        else:
            narrow = getattr(torch, encoding)
            made = {leaf: store_angles(values, narrow) if part == "angles" else values.to(narrow)}
        memo |= {(id(owner), prefix + key): tensor for key, tensor in made.items()}
    tensor = memo[id(owner), prefix + leaf]
    check_finite(record, name, tensor)
    return tensor


def store_angles(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles in the stored dtype; those outside (-pi, pi] are wrapped first if it is narrower.

    Example:
        >>> store_angles(torch.tensor([1.5, 7.0]), torch.float16)
        tensor([1.5000, 0.7168], dtype=torch.float16)
    """
    if dtype == angles.dtype or dtype.itemsize >= angles.dtype.itemsize:
        return angles.to(dtype)
    return wrap_angles(angles).to(dtype)


def wrap_angles(angles: Tensor) -> Tensor:
    """The same angles in float64, those outside (-pi, pi] less whole turns."""
    wide = angles.double()
    wrapped = wide - 2 * torch.pi * torch.round(wide / (2 * torch.pi))
    return torch.where(wide.abs() > torch.pi, wrapped, wide)


def check_finite(record: LayerRecord, name: str, tensor: Tensor) -> None:
    """Raises `PackedFileError` when a number of a layer is NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise PackedFileError(
            "every number of a packed layer must be finite",
            got=f"{record.path}.{name} has {count} NaN or infinite of {tensor.numel()}",
            fix="Find the step where training diverged; pack an earlier checkpoint.",
        )


def _values(live: Tensor | nn.Module) -> Tensor:
    if isinstance(live, Tensor):
        return live
    values = live.values if isinstance(live, CodedNumbers) else live.angles
    assert isinstance(values, Tensor)
    return values


def _encoding(live: Tensor | nn.Module | None) -> str:
    if isinstance(live, CodedNumbers):
        return {bits: name for name, bits in CODE_BITS.items()}[live.bits]
    return "float16"
