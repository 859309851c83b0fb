"""Top floor: a widget of `viz` with the numbers of `deploy`, which do not import one another."""

from typing import Any

from lightning_bfmoe.deploy.devices import DEVICES, human_bytes
from lightning_bfmoe.deploy.memory import FORMS, experts_that_fit, plan_memory
from lightning_bfmoe.viz.memory_planner import MemoryPlannerBase


class MemoryPlanner(MemoryPlannerBase):
    """Sliders for the sizes of feed-forward layers; their bytes as dense, MoE and ButterflyMoE.

    Every number is that of `plan_memory`, which counts what a packed file really holds. Ratios are
    given against the fp32 MoE *and* against one whose experts are ternary, the fair opponent.

    Example:
        >>> planner = MemoryPlanner(d_model=512, d_ff=2048, num_experts=64, device="rpi5")
        >>> planner.sliders["num_experts"].value = 256
        >>> planner.plan.settings["num_experts"]
        256

    Args:
        d_model: Width of the model.
        d_ff: Hidden width.
        num_experts: Experts per layer (count).
        top_k: Experts that a token visits (count).
        angle_bits: Bits of a stored angle: 4, 8, 16 or 32.
        layers: Equal layers (count).
        gated: Three matrices instead of two.
        device: A name in `deploy.devices.DEVICES`.
        **others: Further settings of `plan_memory`, without a slider.

    Raises:
        ConfigError: Sizes that contradict each other.
    """

    def __init__(
        self,
        d_model: int = 512,
        d_ff: int = 2048,
        num_experts: int = 64,
        top_k: int = 2,
        *,
        angle_bits: int = 8,
        layers: int = 1,
        gated: bool = False,
        device: str = "rpi5",
        **others: Any,
    ) -> None:
        settings = {
            "d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "top_k": top_k,
            "angle_bits": angle_bits, "layers": layers, "gated": gated, "device": device, **others,
        }  # fmt: skip
        super().__init__(plan_memory, experts_that_fit, FORMS, DEVICES, human_bytes, settings)
