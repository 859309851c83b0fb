"""Which documents are held out: a rule that depends on their names alone, and on no random number.

Cutting one text in two lets names, refrains and quotations of a document appear on both sides. We
hold out whole documents, so no validation text was trained on.
"""

import hashlib
from collections.abc import Mapping

from lightning_bfmoe.errors import BFMoEError


def name_order(documents: Mapping[str, str]) -> list[str]:
    """Names sorted by the sha256 of the name: shuffled, and the same on every machine."""
    return sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def split_documents(documents: Mapping[str, str], *fractions: float) -> list[dict[str, str]]:
    """Hold out whole documents: one part per fraction, then the rest.

    Names are visited in the order of their sha256. A part takes a document when it still fits into
    its share of characters; a part that got none takes the shortest one left. A single document is
    cut instead: its last characters are held out, up to the next line end.

    Example:
        >>> texts = {name: name * 25 for name in "abcd"}
        >>> held, rest = split_documents(texts, 0.25)
        >>> sorted(held), sorted(rest)
        (['d'], ['a', 'b', 'c'])

    Args:
        documents: Name -> text.
        fractions: Share of all characters to hold out for each part, each above 0, sum below 1.

    Returns:
        One ``{name: text}`` per fraction, and the remaining documents last. No text in two parts.

    Raises:
        BFMoEError: Fractions out of range, or fewer documents than parts (and more than one).
    """
    if not all(0 < fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        raise BFMoEError(
            "held-out fractions must lie above 0 and sum to less than 1",
            got=fractions,
            fix="Use validation_fraction=0.05, tuning_fraction=0.05.",
        )
    if len(documents) == 1:
        return _cut_one(documents, fractions)
    if len(documents) < len(fractions) + 1:
        raise BFMoEError(
            f"{len(fractions) + 1} parts need at least as many documents",
            got=f"{len(documents)} documents",
            fix="Give more files, or a single one, which is cut.",
        )
    total = sum(map(len, documents.values()))
    left = name_order(documents)
    parts = []
    for reserve, fraction in zip(range(len(fractions), 0, -1), fractions, strict=True):
        part: list[str] = []
        room = fraction * total
        for name in left:
            if len(documents[name]) <= room and len(left) - len(part) > reserve:
                part.append(name)
                room -= len(documents[name])
        part = part or [min(left, key=lambda name: len(documents[name]))]
        left = [name for name in left if name not in part]
        parts.append(part)
    return [
        {name: documents[name] for name in documents if name in part} for part in (*parts, left)
    ]


def _cut_one(documents: Mapping[str, str], fractions: tuple[float, ...]) -> list[dict[str, str]]:
    """Cut the end of the only document into one piece per fraction, at line ends."""
    ((name, text),) = documents.items()
    cuts = [len(text)]
    for fraction in fractions:
        wanted = cuts[-1] - int(fraction * len(text))
        cuts.append(text.find("\n", wanted, cuts[-1]) + 1 or wanted)
    parts = [{name: text[low:high]} for high, low in zip(cuts, cuts[1:], strict=False)]
    parts.append({name: text[: cuts[-1]]})
    if not all(part[name] for part in parts):
        raise BFMoEError(
            "every part of a text that is cut must hold at least one character",
            got=f"{len(text)} characters, fractions {fractions}",
            fix="Give a longer text or larger fractions.",
        )
    return parts
