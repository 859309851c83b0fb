"""Reading local files through Hugging Face `datasets` without touching the network.

`datasets` and `huggingface_hub` read ``HF_HUB_OFFLINE`` once, when they are imported. Without it a
machine that cannot reach the Hub spends about 20 s on retries per name, so the variable has to be
set *before* the first import. That is why this file imports `datasets` inside functions only.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lightning_bfmoe.errors import BFMoEError

HUB = ("huggingface.co", 443)


def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Say whether one TCP connection to the Hugging Face Hub can be opened.

    Args:
        timeout: Seconds to wait for the connection (a slow DNS answer is not covered).

    Returns:
        False when ``HF_HUB_OFFLINE`` is set to a true value, else the result of the attempt.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    try:
        with socket.create_connection(HUB, timeout=timeout):
            return True
    except OSError:
        return False


def import_datasets() -> ModuleType:
    """Import `datasets`; on a machine that cannot reach the Hub, tell it so first.

    Raises:
        BFMoEError: `datasets` is not installed.
    """
    if "datasets" not in sys.modules and not hub_is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import datasets
    except ImportError as error:
        raise BFMoEError(
            "reading a corpus needs the package `datasets`",
            got=str(error),
            fix="Run: pip install datasets",
        ) from error
    return datasets


def read_documents(files: Sequence[Path]) -> list[str]:
    r"""Read every file as one document, with `datasets` in streaming mode (no copy on disk).

    Bytes that are not UTF-8 become U+FFFD; all line ends become ``\n``.

    Args:
        files: Paths of the text files.

    Returns:
        Their texts, in the same order.

    Raises:
        BFMoEError: There is no file, or a file is empty.
    """
    empty = [str(path) for path in files if path.stat().st_size == 0]
    if not files or empty:
        raise BFMoEError(
            "a corpus needs at least one file, and none of them empty",
            got=f"{len(files)} files, empty: {empty[:3]}",
            fix="Check the path, or load_corpus('stdlib'), which needs nothing.",
        )
    rows = import_datasets().load_dataset(
        "text",
        data_files={"train": [str(path) for path in files]},
        sample_by="document",
        split="train",
        streaming=True,
        encoding_errors="replace",
    )
    texts = [row["text"] for row in rows]
    assert len(texts) == len(files), "datasets yields one row per file with sample_by='document'"
    return texts
