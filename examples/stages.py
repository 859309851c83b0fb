"""Finished work is kept: a stage runs once for the same settings, source code and input.

A stage writes into a folder that gets its name only when everything is there, so an interrupted run
leaves the finished stages and nothing else.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def source_hash() -> str:
    """sha256 over our package, the examples and the version of torch: any edit runs all again."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("lightning_bfmoe", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Stages:
    """The stages of one output folder.

    Args:
        folder: Where the stages' folders stand.
        fresh: Run every stage again.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self.source = source_hash()
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, depends: dict[str, Any]) -> str:
        """Hash of the source code and of everything that a stage's result depends on."""
        text = json.dumps({"source": self.source, **depends}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self, name: str, depends: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a stage that is done and whole, else None."""
        folder = self.folder / name
        try:
            record = json.loads((folder / "record.json").read_text())
            whole = all(_sha256(folder / file) == sha for file, sha in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        same = record.get("key") == self.key(depends)
        return record if whole and same and not self.fresh else None

    def run(
        self, name: str, depends: dict[str, Any], work: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the record of a finished stage, or do its work.

        Args:
            name: Name of the stage, and of its folder.
            depends: What the result depends on, apart from the source code; JSON values.
            work: Gets an empty folder to write into, returns the record as JSON values.
        """
        record = self.finished(name, depends)
        if record is not None:
            return record
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            result = work(partial)
            files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
            record = {**result, "key": self.key(depends), "files": files}
            (partial / "record.json").write_text(json.dumps(record))
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return record


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
