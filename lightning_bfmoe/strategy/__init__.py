"""Floor 5: `ButterflyMoEStrategy`, Lightning's DDP with what these layers need from it.

Importing this room imports no Lightning: the door reaches `registry` through it.
"""

import importlib
from typing import Any

_HOMES = {
    "ButterflyMoEStrategy": "lightning_bfmoe.strategy.strategy",
    "parameter_checksums": "lightning_bfmoe.strategy.replicas",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a name of this room when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)
