"""An exported folder on onnxruntime, with its cache. `examples/edge_app.py` does it without us."""

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bfmoe.deploy.onnx_export.folder import AGAIN, MODEL, MODEL_OPS, read_settings
from lightning_bfmoe.errors import ExportError

MIN_RUNTIME = (1, 28)
"""The first onnxruntime with a fast 2-bit product; older ones run scalar code, 500x slower."""

Cache = list[NDArray[np.float32]]


class OnnxModel:
    """The exported model as a function of ids and a cache.

    Args:
        folder: Written by `export_onnx`.
        threads: Of onnxruntime; None: one a core.
        options: Further entries of its session configuration.
        library: A library with the custom op for the rotations; None: the one that was compiled
            with this package, where it is there; the empty path: none, the stock graph runs.

    Raises:
        ExportError: The folder is damaged, or the runtime missing, too old, or without the opset.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        options: dict[str, str] | None = None,
        library: str | Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = read_settings(self.folder)
        found = find_library() if library is None else Path(library)
        self.fused = found != Path() and (self.folder / MODEL_OPS).is_file()
        """Whether the custom op computes the rotations."""
        graph = self.folder / (MODEL_OPS if self.fused else MODEL)
        self.session = open_session(graph, threads, options, found if self.fused else None)
        self.context: int | None = self.settings.get("context")

    def empty_past(self, batch: int) -> Cache:
        """The cache before the first token."""
        return [
            np.zeros((batch, site["heads"], 0, site[width]), np.float32)
            for site in self.settings["cache"]
            for width in ("key_width", "value_width")
        ]

    def __call__(
        self, ids: NDArray[np.int64], past: Cache | None = None
    ) -> tuple[NDArray[np.float32], Cache]:
        """Ids (batch, time) and the cache to logits (batch, time, vocabulary) and the longer cache.

        Raises:
            ExportError: Ids the model does not know, or more than its context holds.
        """
        ids = np.asarray(ids, np.int64)
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ExportError(
                "ids have shape (batch, time >= 1)", got=ids.shape, fix="Give at least one token."
            )
        vocabulary = self.settings["vocab_size"]
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ExportError(
                f"the model knows tokens 0 to {vocabulary - 1}",
                got=f"{ids.min()} to {ids.max()}",
                fix="Use the tokenizer of the training.",
            )
        past = self.empty_past(len(ids)) if past is None else past
        seen = past[0].shape[2] if past else 0
        if self.context is not None and seen + ids.shape[1] > self.context:
            raise ExportError(
                f"the model's context holds {self.context} tokens",
                got=f"{seen + ids.shape[1]} tokens",
                fix="Shorten the prompt.",
            )
        names = [value.name for value in self.session.get_inputs()]
        logits, *present = self.session.run(None, dict(zip(names, [ids, *past], strict=True)))
        return logits, present

    def generate(self, ids: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
        """The most likely continuation, with the cache; it ends early where the context does."""
        fresh, past = np.asarray(ids, np.int64), None
        written = [fresh]
        for _ in range(num_tokens):
            if self.context is not None and sum(w.shape[1] for w in written) > self.context:
                break
            logits, past = self(fresh, past)
            fresh = logits[:, -1].argmax(axis=-1)[:, None]
            written.append(fresh)
        return np.concatenate(written, axis=1)


def find_library() -> Path:
    """The library that was compiled with this package, if it holds the custom op; else `Path()`."""
    from lightning_bfmoe.kernels.library import BUILT, missing_cpu

    path = Path(os.environ.get("BFMOE_CPU_LIBRARY", BUILT))
    if missing_cpu() or not hasattr(ctypes.CDLL(str(path.resolve())), "RegisterCustomOps"):
        return Path()
    return path


def open_session(
    path: Path,
    threads: int | None = None,
    options: dict[str, str] | None = None,
    library: Path | None = None,
) -> Any:
    """A CPU session, with the custom ops of a library.

    Raises:
        ExportError: onnxruntime is missing or too old, or cannot run the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "an exported model runs on onnxruntime",
            got=error,
            fix="Run: pip install 'onnxruntime>=1.28'.",
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if version < MIN_RUNTIME:
        raise ExportError(
            "the 2-bit product needs onnxruntime 1.28 or newer",
            got=onnxruntime.__version__,
            fix="Run: pip install -U onnxruntime (it needs Python 3.11).",
        )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads or 0
    settings.enable_mem_pattern = False  # plans for one length, and keeps its memory for others
    if "torch" in sys.modules:  # its threads and ours would wait for one another in busy loops
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in (options or {}).items():
        settings.add_session_config_entry(name, value)
    try:
        if library is not None:
            settings.register_custom_ops_library(str(library.resolve()))
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own exceptions for each code
        text = str(error)
        if "opset" in text.lower():
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} knows the graph's opset",
                got=text[:300],
                fix="Install a newer onnxruntime, or export with a lower opset.",
            ) from error
        raise ExportError("onnxruntime can run the graph", got=text[:300], fix=AGAIN) from error
    give_back_memory()
    return session


def give_back_memory() -> None:
    """Returns what the start of a session has freed to the system; glibc keeps it otherwise.

    With int8 products that is three times what the session needs.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
