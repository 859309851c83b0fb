"""`TextStream`: the text of tokens that come one by one, in pieces that are whole characters."""

from collections.abc import Callable, Iterable


class TextStream:
    """Turns tokens into text as they come; the pieces add up to the text of all of them.

    A character may take several tokens: it is held back until it is whole. Only the last tokens
    are decoded each time, so a long text costs no more per token than a short one.

    Example:
        >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
        >>> [stream.add(token) for token in "né".encode()], stream.end()
        (['n', '', 'é'], '')

    Args:
        decode: From token ids to text; U+FFFD stands for what is no character yet.
        before: Ids that stand before and are not part of the text, such as the prompt.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Iterable[int] = ()) -> None:
        self._decode, self._ids = decode, list(before)
        self._start = max(len(self._ids) - 8, 0)  # where decoding starts: some tokens look back
        self._told = len(self._ids)  # up to where the text has been told

    def add(self, token: int) -> str:
        """The text that one more token completes; often a piece of a word, sometimes nothing."""
        self._ids.append(token)
        piece = self._rest()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return piece

    def end(self) -> str:
        """What has been held back; U+FFFD where it never became a character."""
        piece = self._rest()
        self._start = self._told = len(self._ids)
        return piece

    def _rest(self) -> str:
        known = self._decode(self._ids[self._start : self._told])
        return self._decode(self._ids[self._start :])[len(known) :]
