"""Floor 1: faster implementations of floor 0's operations, same results, one dispatch table."""

from lightning_bfmoe.kernels.combine import combine
from lightning_bfmoe.kernels.decode import packed_experts
from lightning_bfmoe.kernels.dispatch import Kernel, choose, describe, kernels, register, use_kernel
from lightning_bfmoe.kernels.dispatch_rows import dispatch_rows, group_by_expert
from lightning_bfmoe.kernels.linear import PackedLinear, packed_linear
from lightning_bfmoe.kernels.quantize import blend_to_ternary
from lightning_bfmoe.kernels.rotation import rotate
from lightning_bfmoe.kernels.route import route, router_logits
from lightning_bfmoe.kernels.ternary import ternary_linear

__all__ = [
    "Kernel",
    "PackedLinear",
    "blend_to_ternary",
    "choose",
    "combine",
    "describe",
    "dispatch_rows",
    "group_by_expert",
    "kernels",
    "packed_experts",
    "packed_linear",
    "register",
    "rotate",
    "route",
    "router_logits",
    "ternary_linear",
    "use_kernel",
]
