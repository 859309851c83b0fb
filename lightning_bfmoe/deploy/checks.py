"""Rules for data from strangers: strict JSON, and refusals that say the way out."""

import json
import math
import re
from typing import Any, NoReturn

from lightning_bfmoe.errors import PackedFileError

PACK = "Write packed files with `lightning_bfmoe.pack(model, path)`."
DAMAGED = "The file is damaged; copy or pack it again."
FOREIGN = "This is no packed model, or it is damaged; write one with `lightning_bfmoe.pack`."


def refuse(rule: str, got: object, fix: str | None = None) -> NoReturn:
    """Raises `PackedFileError` with the usual way out."""
    raise PackedFileError(rule, got=got, fix=DAMAGED if fix is None else fix)


def strict_json(raw: bytes | str) -> Any:
    """Parses JSON without its traps: no NaN, no doubled key, no lone surrogate, no endless nesting.

    Raises:
        PackedFileError: The text is none of that.
    """
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        if re.search(r"\\u[dD][89a-fA-F]", text):
            refuse("text must be plain UTF-8", "an escaped surrogate")
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except PackedFileError:
        raise
    except RecursionError as error:
        raise PackedFileError(
            "the header must be shallow JSON", got="deep nesting", fix=DAMAGED
        ) from error
    except ValueError as error:
        raise PackedFileError(
            "the header must be JSON", got=str(error)[:200], fix=FOREIGN
        ) from error


def is_counts(values: object) -> bool:
    """True for a list of integers in [0, 2**62)."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
        for value in values
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        refuse("a JSON object names each key once", "a doubled key")
    return result


def _no_constant(text: str) -> NoReturn:
    refuse("numbers must be finite", text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        refuse("numbers must be finite", text[:40])
    return value
