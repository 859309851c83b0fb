"""ButterflyMoE for PyTorch Lightning: N experts, learned rotations of one ternary matrix."""

import importlib
from typing import Any

__version__ = "0.1.0"

_DOOR = {
    "ActivationOutliers": "lightning_bfmoe.callbacks",
    "AngleWarmup": "lightning_bfmoe.callbacks",
    "ButterflyMoE": "lightning_bfmoe.layers",
    "ButterflyMoECallback": "lightning_bfmoe.callbacks",
    "ButterflyMoEConfig": "lightning_bfmoe.config",
    "ButterflyMoEStrategy": "lightning_bfmoe.strategy",
    "BFMoEError": "lightning_bfmoe.errors",
    "ExpertMap": "lightning_bfmoe.viz",
    "ExpertUsage": "lightning_bfmoe.callbacks",
    "MemoryPlanner": "lightning_bfmoe.widgets",
    "NotebookMonitor": "lightning_bfmoe.callbacks",
    "OrbitExplorer": "lightning_bfmoe.viz",
    "OrbitRecorder": "lightning_bfmoe.callbacks",
    "OutlierDashboard": "lightning_bfmoe.callbacks",
    "PackedCheckpoint": "lightning_bfmoe.callbacks",
    "Plan": "lightning_bfmoe.plan",
    "RoutingView": "lightning_bfmoe.viz",
    "TernarySchedule": "lightning_bfmoe.callbacks",
    "Calibration": "lightning_bfmoe.calibrate",
    "calibrated_swap": "lightning_bfmoe.calibrated",
    "export_onnx": "lightning_bfmoe.deploy",
    "inspect_packed": "lightning_bfmoe.deploy",
    "load_from_checkpoint": "lightning_bfmoe.checkpoint",
    "load_packed": "lightning_bfmoe.deploy",
    "pack": "lightning_bfmoe.deploy",
    "plan_memory": "lightning_bfmoe.deploy",
    "prune_experts": "lightning_bfmoe.calibrate.experts",
    "register_adapter": "lightning_bfmoe.swap",
    "restore": "lightning_bfmoe.swap",
    "selected_swap": "lightning_bfmoe.selected",
    "swap_feed_forward": "lightning_bfmoe.swap",
}

__all__ = sorted(_DOOR)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the door itself imports nothing heavy."""
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value = getattr(importlib.import_module(_DOOR[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_DOOR])


def _register_strategies() -> None:
    """Let ``Trainer(strategy="bfmoe")`` be found, now or when Lightning is imported."""
    from lightning_bfmoe.strategy import registry

    registry.install()


_register_strategies()
