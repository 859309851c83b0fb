"""Floor 1: faster implementations of floor 0's operations, same results, one dispatch table."""

from lightning_bfmoe.kernels.dispatch import Kernel, choose, describe, kernels, register, use_kernel
from lightning_bfmoe.kernels.rotation import rotate

__all__ = ["Kernel", "choose", "describe", "kernels", "register", "rotate", "use_kernel"]
