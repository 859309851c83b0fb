"""Floor 3: pictures and widgets of a model, a layer or a recording.

Importing this room loads neither matplotlib nor a widget library; a name is loaded when it is first
used. Widgets need ``pip install "lightning-bfmoe[notebooks]"``, pictures do not.
"""

import importlib
from typing import Any

_NAMES = {
    "ExpertMap": "expert_map",
    "ExplorerData": "explorer_data",
    "OrbitExplorer": "explorer",
    "Recording": "recording",
    "RoutingView": "routing_view",
    "Snapshot": "recording",
    "distances": "orbits",
    "embed_experts": "expert_embedding",
    "expert_figure": "expert_picture",
    "explorer_figure": "explorer_picture",
    "export_explorer": "export",
    "read_recording": "recording",
    "record_model": "snapshot",
    "routing_figure": "routing_picture",
    "trace_routes": "routes",
}

__all__ = sorted(_NAMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
