"""Writing a packed file: all of it, or nothing at all."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_bfmoe.deploy.container import BLANK, DTYPE_NAMES, MAX_HEADER
from lightning_bfmoe.errors import PackedFileError

Write = Callable[[BinaryIO], None]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes in C order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_container(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool
) -> int:
    """Writes the file and returns its size in bytes; on any failure nothing is left behind.

    Raises:
        PackedFileError: The file exists and `overwrite` is false, or the system refused to write.
    """
    header: dict[str, Any] = {"__metadata__": {"digest": BLANK, **metadata}}
    # Wide numbers first, so that every tensor is aligned and can be mapped into memory.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise PackedFileError(
            f"the header takes at most {MAX_HEADER} bytes",
            got=len(raw),
            fix="Pack parts of the model into files of their own.",
        )
    raw = raw.replace(BLANK.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)

    def write(file: BinaryIO) -> None:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))

    check_target(path, overwrite)
    try:
        _write_atomically(path, write, overwrite)
    except FileExistsError:
        check_target(path, overwrite)
        raise
    except OSError as error:
        raise PackedFileError(
            "the folder must be writable", got=error, fix="Nothing was left behind."
        ) from error
    return 8 + len(raw) + offset


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a path that cannot become a new file, before any work is done.

    Raises:
        PackedFileError: See the messages.
    """
    if path.is_dir():
        raise PackedFileError(
            "the target must be a file", got=f"directory {path}", fix="Add a file name."
        )
    if path.exists() and not overwrite:
        raise PackedFileError(
            "a file is never overwritten unasked",
            got=path,
            fix="Pass overwrite=True or another path.",
        )
    if not path.parent.is_dir():
        raise PackedFileError("the folder must exist", got=path.parent, fix="Create it first.")


def _write_atomically(path: Path, write: Write, overwrite: bool) -> None:
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.tmp"
    try:
        if not _write_unnamed(temporary, write):
            with open(temporary, "xb") as file:
                _fill(file, write)
        _publish(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(temporary, path)
        except FileExistsError:  # it has come into being meanwhile
            raise
        except OSError:  # a file system without hard links
            check_target(path, overwrite)
        else:
            return
    os.replace(temporary, path)


def _write_unnamed(target: Path, write: Write) -> bool:
    """Writes a file that has no name until it is whole, so that even a killed process leaves none.

    Returns False where the system does not have such files (Linux has).
    """
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        number = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return False
    with open(number, "wb") as file:
        _fill(file, write)
        try:
            # Naming a folder makes Python follow the link in /proc; the absolute path ignores it.
            os.link(f"/proc/self/fd/{number}", target, src_dir_fd=number, follow_symlinks=True)
        except OSError:
            return False
    return True


def _fill(file: BinaryIO, write: Write) -> None:
    write(file)
    file.flush()
    os.fsync(file.fileno())
