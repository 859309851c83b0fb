"""Floor 3: from a trained model to one small file and back, without Lightning."""

from lightning_bfmoe.deploy.cache import KVCache
from lightning_bfmoe.deploy.device_plan import DevicePlan, plan_device
from lightning_bfmoe.deploy.devices import DEVICES
from lightning_bfmoe.deploy.export import ExportReport, export_onnx
from lightning_bfmoe.deploy.format import read_packed
from lightning_bfmoe.deploy.generate import Continuation, Step, TokenGenerator
from lightning_bfmoe.deploy.inspect import inspect_packed
from lightning_bfmoe.deploy.load import load_packed
from lightning_bfmoe.deploy.memory import MemoryPlan, experts_that_fit, plan_memory
from lightning_bfmoe.deploy.pack import check_choices, pack
from lightning_bfmoe.deploy.report import PackedSummary, PackReport
from lightning_bfmoe.deploy.sampling import Sampling
from lightning_bfmoe.deploy.text import TextStream
from lightning_bfmoe.deploy.verify import Verified, verify_packed

__all__ = [
    "DEVICES",
    "ExportReport",
    "Continuation",
    "DevicePlan",
    "KVCache",
    "MemoryPlan",
    "PackReport",
    "PackedSummary",
    "Sampling",
    "Step",
    "TextStream",
    "TokenGenerator",
    "Verified",
    "check_choices",
    "experts_that_fit",
    "export_onnx",
    "inspect_packed",
    "load_packed",
    "pack",
    "plan_device",
    "plan_memory",
    "read_packed",
    "verify_packed",
]
