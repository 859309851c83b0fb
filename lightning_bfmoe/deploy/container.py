"""The outer file: safetensors bytes, read by strict rules.

    8 bytes   N, little-endian u64
    N bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest  the tensors' bytes, without holes, in the order of their offsets

Any safetensors reader opens it. Ours adds a digest over the JSON (`docs/format.md`), so that one
flipped bit anywhere is noticed, and trusts no number of the file before checking it.
"""

import hashlib
import math
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_bfmoe.deploy.checks import FOREIGN, PACK, is_counts, refuse, strict_json
from lightning_bfmoe.errors import PackedFileError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORMAT_VERSION = 3
"""What is written; 1 and 2 are read too."""
MAX_HEADER = 16 << 20
"""Longest JSON that is parsed (bytes); about 60 000 tensors."""
BLANK = "0" * 64


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in the file; `start` and `end` count from the first data byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Container:
    """A checked header: every tensor lies inside the file, and none overlaps another."""

    path: Path
    file_bytes: int
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]


def checksum(dtype: str, shape: Iterable[int], data: bytes | bytearray | memoryview) -> str:
    """SHA-256 over dtype, shape and bytes, so that a changed shape is as visible as a changed byte.

    Example:
        >>> checksum("U8", (1,), b"x")[:8]
        '848dc2fe'
    """
    digest = hashlib.sha256(f"{dtype}:{list(shape)}:".encode())
    digest.update(data)
    return digest.hexdigest()


def read_container(path: Path) -> Container:
    """Reads and checks the header; no tensor is read yet.

    Raises:
        PackedFileError: The file is missing, empty, cut, foreign, newer or damaged.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PackedFileError(
                "a packed model is a regular file", got=path, fix="Name the file."
            )
        with open(path, "rb") as file:
            raw = _read_header_bytes(file, status.st_size)
    except OSError as error:
        raise PackedFileError(
            "a packed file must be readable", got=error, fix="Check the path."
        ) from error
    header = strict_json(raw)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != "bfmoe":
        refuse("the file must carry format 'bfmoe'", "another kind of file", PACK)
    if not all(isinstance(value, str) for value in metadata.values()):
        refuse("metadata must map text to text", "other values")
    check_version(metadata)
    _check_digest(raw, metadata.pop("digest", None))
    tensors = {name: _check_spec(name, spec) for name, spec in header.items()}
    data_start = 8 + len(raw)
    _check_layout(tensors, status.st_size - data_start)
    return Container(path, status.st_size, data_start, metadata, tensors)


def read_tensor(file: BufferedReader, container: Container, name: str, expected: str) -> Tensor:
    """Reads one tensor into memory of its own and compares its checksum.

    Raises:
        PackedFileError: The bytes are not those that were written.
    """
    spec = container.tensors[name]
    try:
        data = bytearray(spec.end - spec.start)
    except (MemoryError, OverflowError) as error:
        raise PackedFileError(
            "a tensor must fit into memory", got=f"{name}: {spec.shape}"
        ) from error
    file.seek(container.data_start + spec.start)
    if file.readinto(data) != len(data) or checksum(spec.dtype, spec.shape, data) != expected:
        refuse("every tensor must match its checksum", name)
    if not data:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if spec.dtype == "BOOL" and bool((flat > 1).any()):
        refuse("a boolean is the byte 0 or 1", name)
    return flat.view(DTYPES[spec.dtype]).reshape(spec.shape)


def check_version(metadata: Mapping[str, str]) -> int:
    """The format version, refused when this library cannot read it."""
    text = metadata.get("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        refuse("format_version must be a positive number", repr(text)[:80])
    if int(text) > FORMAT_VERSION:
        raise PackedFileError(
            f"this library reads format_version up to {FORMAT_VERSION}",
            got=text,
            fix="Install a newer lightning-bfmoe, or pack the model again with this one.",
        )
    return int(text)


def _read_header_bytes(file: BinaryIO, file_bytes: int) -> bytes:
    start = file.read(8)
    if len(start) < 8:
        refuse("a packed file has at least 8 bytes", f"{len(start)} bytes")
    if start[:4] == b"PK\x03\x04" or start[:2] == b"\x80\x02":
        refuse("the file must carry format 'bfmoe'", "a torch pickle file", PACK)
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, file_bytes - 8):
        refuse("the header must fit into the file", f"{length} of {file_bytes} bytes", FOREIGN)
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        refuse("the header must be a JSON object", repr(raw[:16]), FOREIGN)
    return raw


def _check_digest(raw: bytes, digest: object) -> None:
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        refuse("the header must carry its SHA-256 digest", repr(digest)[:80])
    blank = raw.replace(digest.encode(), BLANK.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        refuse("the header must match its digest", "other bytes than were written")


def _check_spec(name: str, spec: object) -> TensorSpec:
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
        refuse("a tensor has dtype, shape and data_offsets", f"{name}: {spec!r:.80}")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"dtype must be one of {sorted(DTYPES)}", f"{name}: {dtype!r:.80}")
    if not (is_counts(shape) and is_counts(offsets) and len(offsets) == 2 and len(shape) <= 64):
        refuse("shape and data_offsets must be lists of counts", f"{name}: {spec!r:.200}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        refuse("data_offsets must span dtype and shape", f"{name}: {spec!r:.200}")
    return TensorSpec(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(tensors: Mapping[str, TensorSpec], data_bytes: int) -> None:
    position = 0
    for name, spec in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != position:
            refuse(
                "tensors must follow one another without holes",
                f"{name} at {spec.start}, not {position}",
            )
        position = spec.end
    if position != data_bytes:
        refuse("the tensors must fill the file exactly", f"{data_bytes} of {position} bytes")
