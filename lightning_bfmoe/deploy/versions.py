"""Headers of older packed files in the words of the present version.

Version 2 has no "correction"; version 1 no "gains", "router", "init" and "example" either.
"""

from typing import Any

from lightning_bfmoe.deploy.checks import refuse


def in_present_words(raw: Any, version: str) -> Any:
    """The inner header as this version writes it; what is malformed stays so.

    Example:
        >>> in_present_words({"layers": []}, "1")
        {'layers': [], 'init': {}, 'example': None}

    Args:
        raw: The header as it was read, of any kind.
        version: Format version of its file.

    Raises:
        PackedFileError: It has words that its version does not know.
    """
    if version == "1":
        raw = _from_version_1(raw)
    return _from_version_2(raw) if version in ("1", "2") else raw


def keys_of(raw: object) -> str:
    """A malformed header's keys, for messages."""
    return f"{sorted(raw)!r:.200}" if isinstance(raw, dict) else type(raw).__name__


def _from_version_1(raw: Any) -> Any:
    """The header of version 1 in the words of version 2; what is malformed stays so."""
    if not isinstance(raw, dict) or {"init", "example"} & set(raw):
        refuse("a header of version 1 has no init and no example", keys_of(raw))
    layers = raw.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            if {"gains", "router"} & set(layer) or layer.get("angles") not in (
                "float16",
                "float32",
            ):
                refuse("a layer of version 1 has its encoding", keys_of(layer))
            layer |= {"gains": layer["angles"], "router": "float32"}
    return {**raw, "init": {}, "example": None}


def _from_version_2(raw: Any) -> Any:
    """The header of version 2 in the words of version 3: no layer has a correction."""
    layers = raw.get("layers") if isinstance(raw, dict) else None
    for layer in layers if isinstance(layers, list) else ():
        config = layer.get("config") if isinstance(layer, dict) else None
        if isinstance(config, dict):
            if "correction" in layer or "correction_rank" in config:
                refuse("a layer of version 2 has no correction", keys_of(layer))
            layer["correction"] = "float16"
            if layer.get("kind") == "ButterflyMoE":
                config["correction_rank"] = 0
    return raw
