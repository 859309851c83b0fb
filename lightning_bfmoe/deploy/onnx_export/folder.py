"""The exported folder: graph, weights, tokenizer, and a JSON that says what belongs to it.

    model.onnx        the graph, for the stock onnxruntime wheel
    model_ops.onnx    the same with our custom op for the rotations, where its library is there
    weights.bin       its numbers, which onnxruntime maps into memory
    tokenizer.json    of the package `tokenizers`; a model of bytes has none
    generation.json   names, sizes and SHA-256 of the above; the context; the cache; sampling

It is written beside its place and renamed when it is whole.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_bfmoe.errors import ExportError

FORMAT, VERSION = "bfmoe-onnx", 1
MODEL, MODEL_OPS, WEIGHTS = "model.onnx", "model_ops.onnx", "weights.bin"
TOKENIZER, SETTINGS = "tokenizer.json", "generation.json"
AGAIN = "Copy the whole folder again, or export the model again."


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end of the block; on any error it goes.

    Raises:
        ExportError: The target exists, or its parent does not.
    """
    check_target(target, overwrite)
    partial = target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.partial"
    try:
        partial.mkdir()
        yield partial
        check_target(target, overwrite)
        _publish(partial, target)
    except OSError as error:
        raise ExportError(
            "the folder must be writable", got=error, fix="Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a place that cannot become an exported folder, before any work is done.

    Raises:
        ExportError: See the messages.
    """
    if not target.parent.is_dir():
        raise ExportError("the parent folder must exist", got=target.parent, fix="Create it first.")
    if not target.exists():
        return
    if not overwrite:
        raise ExportError(
            "a folder is never overwritten unasked",
            got=target,
            fix="Pass overwrite=True (--force), or another path.",
        )
    if not (target.is_dir() and ((target / SETTINGS).is_file() or not any(target.iterdir()))):
        raise ExportError(
            "only an exported folder is overwritten",
            got=f"{target}, which has no {SETTINGS}",
            fix="Name another path.",
        )


def write_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Adds names, sizes and checksums of the files; writes and returns the settings."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.iterdir())
    }
    whole = {"format": FORMAT, "version": VERSION, **settings, "files": files}
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    return whole


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings and checks that every file is there and whole.

    Raises:
        ExportError: A file is missing, foreign, newer or damaged.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(
            f"an exported folder has a {SETTINGS}",
            got=error,
            fix="Name the folder that `bfmoe export` wrote.",
        ) from error
    except ValueError as error:
        raise ExportError(f"{SETTINGS} is JSON text", got=str(error)[:100], fix=AGAIN) from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ExportError(f"{SETTINGS} says format {FORMAT!r}", got=path, fix=AGAIN)
    if settings.get("version") != VERSION:
        raise ExportError(
            f"this library runs exports of version {VERSION}",
            got=settings.get("version"),
            fix="Install a newer lightning-bfmoe, or export the model again.",
        )
    wanted = {"files": dict, "cache": list, "vocab_size": int, "generation": dict}
    for name, kind in wanted.items():
        if not isinstance(settings.get(name), kind):
            raise ExportError(f"{SETTINGS} has {name!r}", got=settings.get(name), fix=AGAIN)
    for name, file in settings["files"].items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ExportError("every file of an export is there", got=f"no {name}", fix=AGAIN)
        if digest(folder / name) != file.get("sha256"):
            raise ExportError("every file of an export is as it was written", got=name, fix=AGAIN)
    return settings


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _publish(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
        return
    old = partial.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
