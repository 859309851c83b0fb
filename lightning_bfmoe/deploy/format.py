"""The inner header of a packed file: what each tensor is, and which layers they make up.

Plain JSON inside the safetensors metadata (`docs/format.md` explains every field):

    {"library": "lightning-bfmoe 0.1.0",
     "tensors": {name: {"sha256": hex, "part": one of PARTS, "layer": path or null}},
     "aliases": {name: name of the tensor it shares},
     "layers": [{"path", "kind", "config", "placement", "bits", "angles", "gains", "router",
                 "correction"}],
     "extra_state": {module path: any JSON},
     "init": {argument of the model's class: plain JSON},
     "example": null or {"inputs": [names of tensors], "output": name of a tensor}}

Older versions read as `versions.in_present_words` says.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bfmoe.deploy.checks import refuse, strict_json
from lightning_bfmoe.deploy.container import (
    DTYPE_NAMES,
    FORMAT_VERSION,
    Container,
    TensorSpec,
    checksum,
    read_container,
    read_tensor,
)
from lightning_bfmoe.deploy.versions import in_present_words, keys_of
from lightning_bfmoe.deploy.writer import tensor_bytes, write_container
from lightning_bfmoe.errors import PackedFileError, SwapError
from lightning_bfmoe.layers.surgery import ReplacementPlan, check_form

PARTS = (
    "substrate", "scales", "angles", "gains", "router", "bias", "dense", "correction", "other",
    "example",
)  # fmt: skip
"""What a tensor is for; `dense` is the fp32 projection of the preset `paper`, `other` the model."""
NUMBERS = ("float16", "float32", "int8", "int4")
"""Encodings of the angles."""
ENCODINGS = {
    "bits": ("1.6", "2"),
    "angles": NUMBERS,
    "gains": ("float16", "float32", "int8"),
    "router": ("float32", "bfloat16"),
    "correction": ("float16", "float32"),
}
"""Field of a layer record -> its values."""


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor: its checksum, its part, and the layer it belongs to."""

    sha256: str
    part: str
    layer: str | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One packed layer: where it stands and how to build it."""

    path: str
    kind: str
    """`ButterflyMoE` or `ButterflyExperts`."""
    config: dict[str, Any]
    """The constructor's arguments: d_model, d_ff, num_experts, gated, activation, ..."""
    placement: ReplacementPlan | None
    """How the layer gets into a model with dense blocks; None: it stands there already."""
    bits: str
    """Encoding of the trits: `1.6` or `2`."""
    angles: str
    """Encoding of the angles: `float16`, `float32`, `int8` or `int4`."""
    gains: str
    """Encoding of the gains: `float16`, `float32` or `int8`."""
    router: str
    """Encoding of the router's weight: `float32` or `bfloat16`."""
    correction: str
    """Encoding of a low-rank correction's factors: `float16` or `float32`."""


@dataclass(frozen=True)
class Example:
    """A recorded forward pass: names of its stored tensors."""

    inputs: list[str]
    output: str


@dataclass(frozen=True)
class Header:
    """Everything about a packed file but the tensors' bytes."""

    tensors: dict[str, TensorRecord]
    layers: list[LayerRecord]
    aliases: dict[str, str] = field(default_factory=dict)
    extra_state: dict[str, Any] = field(default_factory=dict)
    library: str = ""
    init: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's class, where it keeps them (`hparams` of a LightningModule)."""
    example: Example | None = None

    def to_json(self) -> str:
        """The header as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class PackedFile:
    """A packed file whose header passed every check; the tensors are still on disk."""

    container: Container
    header: Header

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype, shape and place of each stored tensor."""
        return self.container.tensors

    def read(self) -> dict[str, Tensor]:
        """Reads every tensor, aliases included (as the very same tensor), and checks each.

        Raises:
            PackedFileError: A tensor's bytes differ from those that were written.
        """
        try:
            with open(self.container.path, "rb") as file:
                tensors = {name: self._read(file, name) for name in self.specs}
        except OSError as error:
            raise PackedFileError("a packed file must be readable", got=error) from error
        return tensors | {alias: tensors[name] for alias, name in self.header.aliases.items()}

    def _read(self, file: BufferedReader, name: str) -> Tensor:
        return read_tensor(file, self.container, name, self.header.tensors[name].sha256)


def write_packed(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, tuple[str, str | None]],
    header: Header,
    *,
    overwrite: bool,
) -> tuple[int, Header]:
    """Writes tensors and header; fills in the tensor records.

    Args:
        path: The new file.
        tensors: Name -> tensor.
        parts: Name -> (part, path of the layer or None).
        header: The header without tensor records.
        overwrite: Replace an existing file.

    Returns:
        Size of the file in bytes, and the complete header.
    """
    records = {}
    for name, tensor in tensors.items():
        digest = checksum(dtype_name(tensor), tensor.shape, tensor_bytes(tensor))
        records[name] = TensorRecord(digest, *parts[name])
    header = replace(header, tensors=records)
    metadata = {
        "format": "bfmoe",
        "format_version": str(FORMAT_VERSION),
        "header": header.to_json(),
    }
    return write_container(path, tensors, metadata, overwrite=overwrite), header


def read_packed(path: str | Path) -> PackedFile:
    """Opens a packed file and checks everything but the tensors' bytes.

    Raises:
        PackedFileError: Something does not fit; the message says what.
    """
    container = read_container(Path(path))
    raw = strict_json(container.metadata.get("header", ""))
    raw = in_present_words(raw, container.metadata["format_version"])
    names = {item.name for item in fields(Header)}
    if not isinstance(raw, dict) or set(raw) != names:
        refuse(f"the inner header has the fields {sorted(names)}", keys_of(raw))
    for name, kind in (("tensors", dict), ("aliases", dict), ("layers", list)):
        if not isinstance(raw[name], kind):
            refuse(f"'{name}' must be a {kind.__name__}", type(raw[name]).__name__)
    if not (isinstance(raw["extra_state"], dict) and isinstance(raw["init"], dict)):
        refuse("'extra_state' and 'init' must be dicts", keys_of(raw))
    if not isinstance(raw["library"], str):
        refuse("'library' must be text", keys_of(raw))
    layers = [_layer(item) for item in raw["layers"]]
    paths = [layer.path for layer in layers]
    if len(set(paths)) != len(paths):
        refuse("every layer has a path of its own", paths)
    tensors = {name: _tensor(name, item, paths) for name, item in raw["tensors"].items()}
    if set(tensors) != set(container.tensors):
        odd = sorted(set(tensors) ^ set(container.tensors))
        refuse("header and file must list the same tensors", f"{len(odd)} differ, as {odd[:3]}")
    for alias, name in raw["aliases"].items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            refuse("an alias must point at a stored tensor", f"{alias!r:.80} -> {name!r:.80}")
    example = _example(raw["example"], tensors)
    header = Header(**{**raw, "tensors": tensors, "layers": layers, "example": example})
    return PackedFile(container, header)


def dtype_name(tensor: Tensor) -> str:
    """The dtype in safetensors' words.

    Raises:
        PackedFileError: The format has no word for it.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise PackedFileError(
            f"a packed tensor has one of the dtypes {sorted(DTYPE_NAMES.values())}",
            got=tensor.dtype,
            fix="Convert the tensor before packing.",
        )
    return DTYPE_NAMES[tensor.dtype]


def _tensor(name: str, raw: object, paths: list[str]) -> TensorRecord:
    if not isinstance(raw, dict) or set(raw) != {"sha256", "part", "layer"}:
        refuse("a tensor record has sha256, part and layer", f"{name}: {keys_of(raw)}")
    digest, part, layer = raw["sha256"], raw["part"], raw["layer"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        refuse("a checksum is 64 hexadecimal digits", f"{name}: {digest!r:.80}")
    if part not in PARTS or layer not in [None, *paths]:
        refuse("a tensor belongs to a known part and layer", f"{name}: {part!r:.40}, {layer!r:.80}")
    return TensorRecord(digest, part, layer)


def _layer(raw: object) -> LayerRecord:
    names = {item.name for item in fields(LayerRecord)}
    if not isinstance(raw, dict) or set(raw) != names:
        refuse(f"a layer record has the fields {sorted(names)}", keys_of(raw))
    if not isinstance(raw["path"], str) or raw["kind"] not in ("ButterflyMoE", "ButterflyExperts"):
        refuse("a layer has a path and a known kind", f"{raw['path']!r:.80}, {raw['kind']!r:.80}")
    for name, known in ENCODINGS.items():
        if raw[name] not in known:
            refuse("a layer has a known encoding", f"{name} {raw[name]!r:.40}, not in {known}")
    placement = raw["placement"]
    if placement is not None:
        try:
            placement = check_form(placement)
        except SwapError as error:
            raise PackedFileError("a layer's placement must be well formed", got=error) from error
        if placement["path"] != raw["path"]:
            refuse("a layer stands where its placement says", f"{raw['path']!r:.80}")
    _check_config(raw["config"], raw["kind"])
    return LayerRecord(**{**raw, "placement": placement})


def _example(raw: object, tensors: Mapping[str, TensorRecord]) -> Example | None:
    """The recorded forward pass; its tensors, and they alone, are of the part `example`."""
    marked = sorted(name for name, record in tensors.items() if record.part == "example")
    if raw is None and not marked:
        return None
    if not isinstance(raw, dict) or set(raw) != {"inputs", "output"}:
        refuse("an example has inputs and output", keys_of(raw))
    inputs, output = raw["inputs"], raw["output"]
    named = [*inputs, output] if isinstance(inputs, list) else []
    texts = [name for name in named if isinstance(name, str)]
    if len(texts) < 2 or len(texts) != len(named) or sorted(texts) != marked:
        refuse("an example names its tensors", f"{raw!r:.80}, marked {marked!r:.80}")
    return Example(inputs, output)


def _check_config(config: object, kind: str) -> None:
    """The settings on which shapes depend; the layer's constructor checks all of them again."""
    if not isinstance(config, dict):
        refuse("a layer's config is a dict", keys_of(config))
    for name in ("d_model", "d_ff", "d_out", "num_experts", "stages"):
        value = config.get(name)
        if name == "stages" and name in config and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            refuse(f"a layer's {name} must be a count", f"{value!r:.80}")
    if min(config["d_model"], config["d_ff"], config["d_out"]) < 2:
        refuse("a layer is at least 2 wide", f"{config!r:.200}")
    rank, most = config.get("correction_rank"), min(config["d_model"], config["d_out"])
    if kind == "ButterflyMoE" and (type(rank) is not int or not 0 <= rank <= most):
        refuse(f"a layer's correction_rank lies in 0 to {most}", f"{rank!r:.80}")
    for name in ("gated", "bias", "gains"):
        if not isinstance(config.get(name), bool):
            refuse(f"a layer's {name} must be true or false", f"{config.get(name)!r:.80}")
    for name, choices in (("granularity", ("row", "tensor")), ("down", ("butterfly", "dense"))):
        if config.get(name) not in choices:
            refuse(f"a layer's {name} must be one of {choices}", f"{config.get(name)!r:.80}")
    if not isinstance(config.get("activation"), str):
        refuse("a layer's activation must be a name", f"{config.get('activation')!r:.80}")
