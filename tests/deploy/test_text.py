"""Text of tokens that come one by one."""

import pytest

from lightning_bfmoe.deploy import TextStream


def decode(ids):
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve — 漢字 🦋!", "", "é" * 50])
@pytest.mark.parametrize("before", [b"", b"prompt ", "lé".encode()])
def test_the_pieces_add_up(text, before):
    stream = TextStream(decode, before)
    pieces = [stream.add(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert stream.end() == ""


def test_bytes_that_become_no_character_come_at_the_end():
    stream = TextStream(decode)
    assert [stream.add(token) for token in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.end() == "\ufffd"


def test_few_tokens_are_decoded_at_once():
    longest = 0

    def counting(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    stream = TextStream(counting, b"x" * 500)
    for token in b"y" * 500:
        stream.add(token)
    assert longest <= 9


def test_a_token_that_joins_with_the_one_before():
    """As SentencePiece does: the first token of a text loses its space."""

    def words(ids):
        return " ".join("abc"[i] for i in ids)

    stream = TextStream(words, [0])
    assert [stream.add(1), stream.add(2), stream.end()] == [" b", " c", ""]
