"""`inspect_packed`: what is in a file, from its header alone."""

from pathlib import Path

from lightning_bfmoe.deploy.format import read_packed
from lightning_bfmoe.deploy.report import PackedSummary


def inspect_packed(path: str | Path) -> PackedSummary:
    """Reads a packed file's header, checks it, and sums up what the file holds.

    The tensors' bytes are not read; `load_packed` checks those.

    Args:
        path: A file written by `pack`.

    Raises:
        PackedFileError: This is no packed file, or its header is damaged.
    """
    file = read_packed(path)
    sizes = {name: spec.end - spec.start for name, spec in file.specs.items()}
    return PackedSummary.of(Path(path), file.container.file_bytes, file.header, sizes)
