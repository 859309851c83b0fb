"""The ternary blend on CUDA: an opaque torch op around `triton_quantize`.

The gradient passes straight through. The result is rounded once, to the dtype of the product that
follows; lambda is read on the device.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_bfmoe.functional.ternary import ABSMEAN_FLOOR
from lightning_bfmoe.kernels.cuda import has_triton, on_device
from lightning_bfmoe.kernels.cuda_plan import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SEARCHED = 16384  # a longer row does not fit one program's registers
_PARTS = 1024  # shares of the sum over a whole matrix


def suits_quantize(
    weight: Tensor, blend: Tensor, scale: str, granularity: str, dtype: torch.dtype
) -> bool:
    """A float32 matrix on CUDA, with triton, and the scale absmean.

    The least-squares kernel (rows up to `MAX_SEARCHED`) runs where `use_kernel` asks for it: its
    first form was wrong on an H100 where the interpreter saw nothing, its second is not tried yet.
    """
    return (
        weight.is_cuda
        and blend.is_cuda
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and weight.numel() > 0
        and dtype in DTYPES
        and scale == "absmean"
        and granularity in ("row", "tensor")
        and has_triton()
    )


def quantize_cuda(
    weight: Tensor, blend: Tensor, scale: str, granularity: str, dtype: torch.dtype
) -> Tensor:
    """One launch (two for one scale over the whole matrix); the gradient is cast, nothing more."""
    return blended(weight, blend, scale, granularity == "row", dtype)


torch.library.define(
    "bfmoe::quantize_cuda",
    "(Tensor weight, Tensor blend, str scale, bool by_row, ScalarType dtype) -> Tensor",
)
blended = torch.ops.bfmoe.quantize_cuda.default


class _Plan:
    """The launches for one shape of matrix."""

    def __init__(self, d_out: int, d_in: int, scale: str, by_row: bool) -> None:
        from lightning_bfmoe.kernels import triton_lstsq
        from lightning_bfmoe.kernels import triton_quantize as kernels

        whole = 1 << (d_in - 1).bit_length()
        columns = min(whole, 8192)
        strict = {"enable_fp_fusion": False}  # the definition rounds every product
        self.rows = max(2048 // columns, 1)
        sizes = {"D": d_in, "COLUMNS": columns, "ROWS": self.rows, "EPS": ABSMEAN_FLOOR}
        sizes["PIECES"] = -(-d_in // columns)
        warps = max(min(columns // 512, 8), 4)
        if scale == "lstsq":
            sizes |= {"COLUMNS": whole, "PIECES": 8}
            warps = max(whole // 1024, 1)
            self.run = Call(triton_lstsq.lstsq_rows_kernel, sizes, num_warps=warps, **strict)
        elif by_row:
            self.run = Call(kernels.absmean_rows_kernel, sizes, num_warps=warps, **strict)
        else:
            self.block, numbers = 4096, d_out * d_in
            share = -(-numbers // (_PARTS * self.block)) * self.block
            self.parts = -(-numbers // share)
            sizes |= {"NUMBERS": numbers, "SHARE": share, "BLOCK": self.block, "PARTS": _PARTS}
            self.sum = Call(kernels.sum_kernel, sizes, num_warps=8)
            self.run = Call(kernels.absmean_tensor_kernel, sizes, num_warps=8, **strict)


@functools.lru_cache(maxsize=256)
def _plan(
    d_out: int, d_in: int, scale: str, by_row: bool, device: torch.device, *dtypes: torch.dtype
) -> _Plan:
    return _Plan(d_out, d_in, scale, by_row)


# On the CPU under triton's interpreter only.
@torch.library.impl("bfmoe::quantize_cuda", ("CUDA", "CPU"))
@on_device
def _blended(weight: Tensor, blend: Tensor, scale: str, by_row: bool, dtype: torch.dtype) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(weight, dtype=dtype)
    d_out, d_in = weight.shape
    plan = _plan(d_out, d_in, scale, by_row, weight.device, blend.dtype, dtype)
    tensors: tuple[Tensor, ...] = weight, blend, out
    grid, numbers = (-(-d_out // plan.rows), 1, 1), [d_out]
    if scale == "lstsq":
        grid, numbers = (d_out, 1, 1), []
    elif not by_row:
        parts = weight.new_empty(plan.parts)
        pair = weight, parts
        addresses = tuple(t.data_ptr() for t in pair)
        plan.sum((plan.parts, 1, 1), addresses, lambda: pair)
        tensors = weight, parts, blend, out
        grid, numbers = (-(-weight.numel() // plan.block), 1, 1), [plan.parts]
    plan.run(grid, tuple(t.data_ptr() for t in tensors), lambda: tensors, *numbers)
    return out


@torch.library.register_fake("bfmoe::quantize_cuda")
def _(weight: Tensor, blend: Tensor, scale: str, by_row: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


class _StraightThrough(torch.autograd.Function):
    """`register_autograd` does the same with 20 us more of Python."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, blend: Tensor, scale: str, by_row: bool, dtype: torch.dtype
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return blended(weight, blend, scale, by_row, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return grad.float(), None, None, None, None


@torch.library.impl("bfmoe::quantize_cuda", "Autograd")
def _differentiable(
    weight: Tensor, blend: Tensor, scale: str, by_row: bool, dtype: torch.dtype
) -> Tensor:
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight, blend, scale, by_row, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return blended(weight, blend, scale, by_row, dtype)
