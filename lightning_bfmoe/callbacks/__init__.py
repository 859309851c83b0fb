"""Floor 5: the Lightning side. A callback reads a step, asks `plan`, sets a value, logs."""

from lightning_bfmoe.callbacks.angle_warmup import AngleWarmup
from lightning_bfmoe.callbacks.butterfly_moe import ButterflyMoECallback
from lightning_bfmoe.callbacks.notebook_monitor import NotebookMonitor
from lightning_bfmoe.callbacks.orbit_recorder import OrbitRecorder
from lightning_bfmoe.callbacks.outlier_dashboard import OutlierDashboard
from lightning_bfmoe.callbacks.outliers import ActivationOutliers
from lightning_bfmoe.callbacks.packed_checkpoint import PackedCheckpoint
from lightning_bfmoe.callbacks.router_balance import RouterBalance
from lightning_bfmoe.callbacks.ternary_schedule import TernarySchedule
from lightning_bfmoe.callbacks.usage import ExpertUsage

__all__ = [
    "ActivationOutliers",
    "AngleWarmup",
    "ButterflyMoECallback",
    "ExpertUsage",
    "NotebookMonitor",
    "OrbitRecorder",
    "OutlierDashboard",
    "PackedCheckpoint",
    "RouterBalance",
    "TernarySchedule",
]
