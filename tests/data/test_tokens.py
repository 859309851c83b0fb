"""Tokenisers give every string back; windows are shifted by one and repeat under their seed."""

import pytest
import torch

from lightning_bfmoe.data import (
    BPETokenizer,
    ByteTokenizer,
    RandomWindows,
    SequentialWindows,
    train_bpe,
)
from lightning_bfmoe.data.tokenizers import line_chunks
from lightning_bfmoe.errors import BFMoEError

STRINGS = [
    "",
    "To be, or not to be",
    "naïve café № 5 — 日本語 🦋",
    "\n\n  tabs\tand  spaces \n",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def bpe():
    """A BPE tokeniser trained on ASCII only."""
    return train_bpe("the quick brown fox jumps over the lazy dog\n" * 50, vocab_size=300)


@pytest.mark.parametrize("text", STRINGS)
def test_round_trip(text, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == torch.int64 and ids.dim() == 1
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids.tolist())


def test_bytes_are_utf8():
    assert ByteTokenizer().encode("é").tolist() == [0xC3, 0xA9]
    assert ByteTokenizer().decode(torch.tensor([0xC3])) == "\ufffd"


def test_bpe_is_shorter_than_bytes_and_repeats(bpe):
    text = "the lazy fox jumps over the quick dog"
    assert len(bpe.encode(text)) < len(text)
    again = train_bpe("the quick brown fox jumps over the lazy dog\n" * 50, vocab_size=300)
    assert again.tokenizer.to_str() == bpe.tokenizer.to_str()


def test_bpe_saves_and_loads(bpe, tmp_path):
    bpe.save(tmp_path / "bpe.json")
    loaded = BPETokenizer.load(tmp_path / "bpe.json")
    assert loaded.vocab_size == bpe.vocab_size
    assert loaded.encode("quick é").tolist() == bpe.encode("quick é").tolist()


def test_long_text_is_encoded_in_pieces(bpe):
    text = "the dog\njumps\n" * 20_000
    assert len(list(line_chunks(text))) > 1
    assert "".join(line_chunks(text)) == text
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize(("text", "size"), [("", 300), ("text", 255)])
def test_bpe_needs_text_and_256_entries(text, size):
    with pytest.raises(BFMoEError, match=r"ByteTokenizer\(\)"):
        train_bpe(text, vocab_size=size)


def test_sequential_windows_predict_every_token_once():
    windows = SequentialWindows(torch.arange(23), context=5)
    assert len(windows) == 4
    inputs, targets = (torch.cat(parts) for parts in zip(*windows, strict=True))
    assert inputs.tolist() == list(range(20)) and targets.tolist() == list(range(1, 21))
    with pytest.raises(IndexError, match="4"):
        windows[4]


def test_random_windows_repeat_and_leave_the_global_state_alone():
    tokens = torch.arange(50)
    before = torch.get_rng_state()
    first, second = (RandomWindows(tokens, 8, 200, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.starts, second.starts)
    assert not torch.equal(first.starts, RandomWindows(tokens, 8, 200, seed=4).starts)
    assert first.starts.min() == 0 and first.starts.max() == 41  # the last place that fits
    inputs, targets = first[0]
    assert torch.equal(inputs + 1, targets) and len(inputs) == 8


@pytest.mark.parametrize("tokens", [torch.arange(5), torch.zeros(2, 9, dtype=torch.int64)])
def test_windows_need_more_tokens_than_the_context(tokens):
    with pytest.raises(BFMoEError, match="longer than the context"):
        SequentialWindows(tokens, 5)
