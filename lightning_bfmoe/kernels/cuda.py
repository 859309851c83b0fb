"""The fused rotation on CUDA: an opaque torch op around the Triton kernels.

A width of 2^q m (m odd) has q regular stages, which pair columns at a power-of-two distance, and
irregular ones for m > 1. Up to `MAX_IRREGULAR` of those run fused too; a width with more of them
(all odd ones from 7 on, for example) applies them one by one in plain PyTorch.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_bfmoe.errors import BFMoEError
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.blocks import irregular_stages
from lightning_bfmoe.kernels.cuda_plan import Plan, fused_stages, plan_for

MAX_FUSED = 8192  # a row must fit the registers of one program


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed, with Gluon (3.6 and later)."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False


def missing_triton() -> str:
    """Why no Triton kernel can run here; empty when they can."""
    return "" if has_triton() else "triton (3.6 or later) is not installed"


def suits_cuda(x: Tensor, angles: Tensor, groups: ExpertGroups) -> bool:
    """CUDA rows that are not double, with triton; at least some stages can be fused."""
    if not x.is_cuda or torch.float64 in (x.dtype, angles.dtype) or x.shape[1] > MAX_FUSED:
        return False
    return sum(fused_stages(x.shape[1], angles.shape[1])) > 0 and has_triton()


def rotate_cuda(x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
    """Rotate sorted rows by their expert's angles; same function as `kernels.rotation.rotate`.

    Args:
        x: (rows, d), float32, bfloat16 or float16; the maths is float32.
        angles: (experts, stages, pairs) float32.
        groups: Which expert each row belongs to.
        inverse: Apply the transpose.
    """
    stages, dtype = angles.shape[1], x.dtype
    fused = sum(fused_stages(x.shape[1], stages))
    if fused == stages:
        return rotation(x, angles, groups.counts, inverse)
    with torch.autocast(x.device.type, enabled=False):
        if inverse:
            x = irregular_stages(x.float(), angles, groups, fused, inverse).to(dtype)
        x = rotation(x, angles[:, :fused], groups.counts, inverse)
        if not inverse:
            x = irregular_stages(x.float(), angles, groups, fused, inverse).to(dtype)
    return x


torch.library.define(
    "bfmoe::rotate_cuda", "(Tensor x, Tensor angles, Tensor counts, bool inverse) -> Tensor"
)
torch.library.define(
    "bfmoe::rotate_cuda_backward",
    "(Tensor y, Tensor grad, Tensor angles, Tensor counts, bool inverse) -> (Tensor, Tensor)",
)
rotation = torch.ops.bfmoe.rotate_cuda.default
rotation_backward = torch.ops.bfmoe.rotate_cuda_backward.default
# On the CPU these run under triton's interpreter only; `suits_cuda` never chooses them there.
_DEVICES = ("CUDA", "CPU")


def on_device(function: Callable) -> Callable:
    """Launch on the device of the first argument, which need not be the current one."""

    @functools.wraps(function)
    def run(x: Tensor, *others: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return function(x, *others)
        with torch.cuda.device(x.device):
            return function(x, *others)

    return run


@torch.library.impl("bfmoe::rotate_cuda", _DEVICES)
@on_device
def _rotation(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    x, angles, counts = x.contiguous(), angles.contiguous(), counts.contiguous()
    (rows, width), (experts, stages, _) = x.shape, angles.shape
    plan = plan_for(
        width, stages, experts, x.device, inverse, False, x.dtype, angles.dtype, counts.dtype
    )
    programs = plan.programs(rows)
    y, memory = torch.empty_like(x), plan.memory(programs)
    at, tensors = plan.addresses(memory), functools.partial(plan.tensors, memory)
    _prepare(plan, angles, counts, at, tensors)
    plan.walks[0](
        (programs, 1, 1),
        (x.data_ptr(), y.data_ptr(), at[0], at[1], at[3]),
        lambda: (x, y, *(tensors()[i] for i in (0, 1, 3))),
        experts,
    )
    return y


def _prepare(plan: Plan, angles: Tensor, counts: Tensor, at: tuple, tensors: Callable) -> None:
    """Fill the coefficient table and the row plan, in one small launch."""
    plan.prepare(
        plan.prepare_grid,
        (angles.data_ptr(), counts.data_ptr(), at[1], at[2], at[0], at[3]),
        lambda: (angles, counts, *(tensors()[i] for i in (1, 2, 0, 3))),
        plan.experts, plan.height,
    )  # fmt: skip


@torch.library.register_fake("bfmoe::rotate_cuda")
def _(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("bfmoe::rotate_cuda_backward", _DEVICES)
@on_device
def _rotation_backward(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, grad, angles, counts = (t.contiguous() for t in (y, grad, angles, counts))
    (rows, width), (experts, stages, _) = y.shape, angles.shape
    plan = plan_for(
        width, stages, experts, y.device, not inverse, True, y.dtype, grad.dtype, angles.dtype,
        counts.dtype,
    )  # fmt: skip
    programs = plan.programs(rows)
    dx, dangles, memory = torch.empty_like(y), torch.empty_like(angles), plan.memory(programs)
    at, tensors = plan.addresses(memory), functools.partial(plan.tensors, memory)
    _prepare(plan, angles, counts, at, tensors)
    table, partner, pair, row_plan, slices = at
    own = y.data_ptr(), grad.data_ptr(), dx.data_ptr()
    for walk in plan.walks:
        walk(
            (programs, 1, 1),
            (*own, slices, table, partner, pair, row_plan),
            lambda: (y, grad, dx, *(tensors()[i] for i in (4, 0, 1, 2, 3))),
            experts,
        )
    plan.collect(
        plan.collect_grid,
        (slices, angles.data_ptr(), row_plan, dangles.data_ptr()),
        lambda: (tensors()[4], angles, tensors()[3], dangles),
        experts, programs,
    )  # fmt: skip
    return dx, dangles


@torch.library.register_fake("bfmoe::rotate_cuda_backward")
def _(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(y, memory_format=contiguous),
        torch.empty_like(angles, memory_format=contiguous),
    )


class _Rotate(torch.autograd.Function):
    """`register_autograd` does the same with 20 us more of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = rotation(x, angles, counts, inverse)
        ctx.save_for_backward(y, angles, counts)
        ctx.inverse = inverse
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        y, angles, counts = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return rotation(grad, angles, counts, not ctx.inverse), None, None, None
        if torch.is_grad_enabled():  # to be differentiated again, which says so
            return *rotation_backward(y, grad, angles, counts, ctx.inverse), None, None
        with torch._C._AutoDispatchBelowAutograd():
            return *rotation_backward(y, grad, angles, counts, ctx.inverse), None, None


@torch.library.impl("bfmoe::rotate_cuda", "Autograd")
def _differentiable(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or angles.requires_grad):
        return _Rotate.apply(x, angles, counts, inverse)
    with torch._C._AutoDispatchBelowAutograd():
        return rotation(x, angles, counts, inverse)


def _no_second(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple:
    raise BFMoEError(
        "the fused rotation has no second derivative",
        got="a backward pass through its backward pass",
        fix='Run the model under lightning_bfmoe.kernels.use_kernel("rotate", "blocks").',
    )


torch.library.register_autograd("bfmoe::rotate_cuda_backward", _no_second)
