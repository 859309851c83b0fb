"""Two tokenisers that need no download: bytes, and a byte-level BPE trained on the spot.

Both turn text into a 1-D int64 tensor and back; both give back every string exactly.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_bfmoe.errors import BFMoEError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

CHUNK = 65_536  # characters a call of `encode_batch` gets at a time


class TextTokenizer(Protocol):
    """What the examples need of a tokeniser."""

    vocab_size: int

    def encode(self, text: str) -> Tensor:
        """Text -> int64 ids, 1-D."""
        ...

    def decode(self, ids: Tensor) -> str:
        """Ids -> text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.decode(tokenizer.encode("naïve"))
        'naïve'
    """

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """Text -> int64 ids, one per UTF-8 byte."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, ids: Tensor) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids.tolist()).decode(errors="replace")


class BPETokenizer:
    """A byte-level BPE tokeniser of the package `tokenizers`.

    Args:
        tokenizer: The trained tokeniser (see `train_bpe`).
    """

    def __init__(self, tokenizer: "HFTokenizer") -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Text -> int64 ids. Long texts are encoded in pieces that end at line ends."""
        pieces = self.tokenizer.encode_batch_fast(list(line_chunks(text)))
        return torch.tensor([token for piece in pieces for token in piece.ids], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids.tolist())

    def save(self, path: str | Path) -> None:
        """Write the tokeniser as JSON."""
        self.tokenizer.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a tokeniser that `save` wrote."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))


def line_chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cut text into pieces of about ``size`` characters that end at line ends, nothing lost."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop


def train_bpe(
    text: str, vocab_size: int = 1024, *, max_characters: int | None = None
) -> BPETokenizer:
    """Train a byte-level BPE tokeniser; give it training text only.

    Args:
        text: Text to count pairs in.
        vocab_size: Entries wanted, 256 bytes included; fewer come out of a short text.
        max_characters: Read only the first so many characters; None for all.

    Returns:
        The tokeniser. The same text gives the same tokeniser.

    Raises:
        BFMoEError: ``vocab_size`` below 256, no text, or the package `tokenizers` is missing.
    """
    if vocab_size < 256 or not text:
        raise BFMoEError(
            "a byte-level BPE needs text and at least the 256 bytes as entries",
            got=f"vocab_size={vocab_size}, {len(text)} characters",
            fix="Use vocab_size=1024, or ByteTokenizer().",
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise BFMoEError(
            "train_bpe needs the package `tokenizers`",
            got=str(error),
            fix="Run: pip install tokenizers, or use ByteTokenizer().",
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(line_chunks(text[:max_characters]), trainer)
    return BPETokenizer(tokenizer)
