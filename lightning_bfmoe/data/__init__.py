"""Text that needs no network: corpora, tokenisers and windows for the examples and notebooks.

Example:
    >>> from lightning_bfmoe.data import ByteTokenizer
    >>> ByteTokenizer().encode("To be").tolist()
    [84, 111, 32, 98, 101]
"""

from lightning_bfmoe.data.corpus import Corpus, load_corpus
from lightning_bfmoe.data.split import split_documents
from lightning_bfmoe.data.tokenizers import BPETokenizer, ByteTokenizer, TextTokenizer, train_bpe
from lightning_bfmoe.data.windows import RandomWindows, SequentialWindows

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "RandomWindows",
    "SequentialWindows",
    "TextTokenizer",
    "load_corpus",
    "split_documents",
    "train_bpe",
]
