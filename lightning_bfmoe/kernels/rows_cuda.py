"""Dispatch and combine on CUDA: opaque torch ops around the Triton kernels of `triton_rows`.

`back` is the inverse of the groups' order: slot s of the flattened choice stands in row back[s].
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.routing import ExpertGroups, slot_rows
from lightning_bfmoe.kernels.cuda import has_triton, on_device
from lightning_bfmoe.kernels.cuda_plan import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# On the CPU these run under triton's interpreter only; no `suits` ever chooses them there.
_DEVICES = ("CUDA", "CPU")


def suits_dispatch(x: Tensor, groups: ExpertGroups, k: int) -> bool:
    """CUDA rows that are not double, with triton."""
    return x.is_cuda and x.dtype in DTYPES and has_triton()


def suits_combine(rows: Tensor, weights: Tensor, groups: ExpertGroups) -> bool:
    """CUDA rows and weights that are not double, with triton."""
    return rows.is_cuda and rows.dtype in DTYPES and weights.dtype in DTYPES and has_triton()


def dispatch_cuda(x: Tensor, groups: ExpertGroups, k: int) -> Tensor:
    """`functional.dispatch` in one launch; its gradient is a gather, the same at every repeat."""
    return dispatched(x, slot_rows(groups), k)


def combine_cuda(rows: Tensor, weights: Tensor, groups: ExpertGroups) -> Tensor:
    """`functional.combine` in one launch, and one for both gradients; sums in float32."""
    return combined(rows, weights, slot_rows(groups))


_LIBRARY = {
    "dispatch_cuda": "(Tensor x, Tensor back, int k) -> Tensor",
    "dispatch_cuda_backward": "(Tensor grad, Tensor back, int k) -> Tensor",
    "combine_cuda": "(Tensor rows, Tensor weights, Tensor back) -> Tensor",
    "combine_cuda_backward":
        "(Tensor grad, Tensor rows, Tensor weights, Tensor back) -> (Tensor, Tensor)",
}  # fmt: skip
for _name, _schema in _LIBRARY.items():
    torch.library.define(f"bfmoe::{_name}", _schema)
dispatched = torch.ops.bfmoe.dispatch_cuda.default
dispatched_backward = torch.ops.bfmoe.dispatch_cuda_backward.default
combined = torch.ops.bfmoe.combine_cuda.default
combined_backward = torch.ops.bfmoe.combine_cuda_backward.default


class _Plan:
    """The two kernels for rows of one width, k and set of dtypes on one device."""

    def __init__(self, width: int, k: int, weighted: bool) -> None:
        from lightning_bfmoe.kernels import triton_rows

        padded = 1 << max(width - 1, 0).bit_length()
        sizes = {"D": width, "K": k, "WEIGHTED": weighted}
        columns = min(padded, 2048)
        self.gather_tokens = max(2048 // columns, 1)
        self.gather_pieces = -(-width // columns)
        shape = {"TOKENS": self.gather_tokens, "COLUMNS": columns}
        self.gather = Call(triton_rows.gather_kernel, {**sizes, **shape}, num_warps=4)
        columns = min(padded, 4096)  # a token's numbers stay in registers for all its slots
        self.spread_tokens = max(2048 // columns, 1)
        shape = {"TOKENS": self.spread_tokens, "COLUMNS": columns, "PIECES": -(-width // columns)}
        warps = 8 if columns > 2048 else 4
        self.spread = Call(triton_rows.spread_kernel, {**sizes, **shape}, num_warps=warps)


@functools.lru_cache(maxsize=256)
def _plan(width: int, k: int, weighted: bool, device: torch.device, *dtypes: torch.dtype) -> _Plan:
    return _Plan(width, k, weighted)


def _gather(rows: Tensor, weights: Tensor | None, back: Tensor, tokens: int, k: int) -> Tensor:
    rows, width = rows.contiguous(), rows.shape[1]
    y = rows.new_empty(tokens, width)
    if y.numel() == 0:
        return y
    factors = rows if weights is None else weights.contiguous()
    plan = _plan(width, k, weights is not None, rows.device, rows.dtype, factors.dtype)
    tensors = rows, factors, back.contiguous(), y
    grid = -(-tokens // plan.gather_tokens), plan.gather_pieces, 1
    plan.gather(grid, tuple(t.data_ptr() for t in tensors), lambda: tensors, tokens)
    return y


def _spread(x: Tensor, rows: Tensor | None, weights: Tensor | None, back: Tensor, k: int) -> tuple:
    x, (tokens, width) = x.contiguous(), x.shape
    spread = x.new_empty(tokens * k, width)
    dots = spread if weights is None else torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )  # fmt: skip
    if spread.numel() == 0:
        return spread, dots.zero_() if weights is not None else dots
    others = (x, x) if rows is None or weights is None else (rows.contiguous(),
                                                             weights.contiguous())  # fmt: skip
    plan = _plan(width, k, weights is not None, x.device, x.dtype, *(t.dtype for t in others))
    tensors = x, *others, back.contiguous(), spread, dots
    grid = -(-tokens // plan.spread_tokens), 1, 1
    plan.spread(grid, tuple(t.data_ptr() for t in tensors), lambda: tensors, tokens)
    return spread, dots


def _check(slots: int, back: Tensor, what: str) -> None:
    if slots != back.shape[0]:
        raise ShapeError(
            f"{what} takes a row for each slot of the (tokens, k) choice",
            got=f"{slots} rows and {back.shape[0]} places",
            fix="Pass the groups that the rows were dispatched with.",
        )


@torch.library.impl("bfmoe::dispatch_cuda", _DEVICES)
@on_device
def _dispatched(x: Tensor, back: Tensor, k: int) -> Tensor:
    _check(x.shape[0] * k, back, "dispatch")
    return _spread(x, None, None, back, k)[0]


@torch.library.register_fake("bfmoe::dispatch_cuda")
def _(x: Tensor, back: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0] * k, x.shape[1])


@torch.library.impl("bfmoe::dispatch_cuda_backward", _DEVICES)
@on_device
def _dispatched_backward(grad: Tensor, back: Tensor, k: int) -> Tensor:
    return _gather(grad, None, back, grad.shape[0] // k, k)


@torch.library.register_fake("bfmoe::dispatch_cuda_backward")
def _(grad: Tensor, back: Tensor, k: int) -> Tensor:
    return grad.new_empty(grad.shape[0] // k, grad.shape[1])


@torch.library.impl("bfmoe::combine_cuda", _DEVICES)
@on_device
def _combined(rows: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    if rows.shape[0] != weights.numel():
        raise ShapeError(
            "combine takes a row for each slot of the (tokens, k) choice",
            got=f"{rows.shape[0]} rows, weights {tuple(weights.shape)}",
            fix="Pass the groups that the rows were dispatched with.",
        )
    _check(rows.shape[0], back, "combine")
    return _gather(rows, weights, back, *weights.shape)


@torch.library.register_fake("bfmoe::combine_cuda")
def _(rows: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


@torch.library.impl("bfmoe::combine_cuda_backward", _DEVICES)
@on_device
def _combined_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, back: Tensor
) -> tuple[Tensor, Tensor]:
    return _spread(grad, rows, weights, back, weights.shape[1])


@torch.library.register_fake("bfmoe::combine_cuda_backward")
def _(grad: Tensor, rows: Tensor, weights: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(rows.shape), weights.new_empty(weights.shape)


class _Dispatch(torch.autograd.Function):
    """`register_autograd` does the same with 20 us more of Python; so does the next."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        with torch._C._AutoDispatchBelowAutograd():
            return dispatched(x, back, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return dispatched_backward(grad, *ctx.saved_tensors, ctx.k), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, back)
        with torch._C._AutoDispatchBelowAutograd():
            return combined(rows, weights, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        rows, weights, back = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *combined_backward(grad, rows, weights, back), None
        # A second derivative is wanted: the same sums of operations that have one.
        k = weights.shape[1]
        of_rows = dispatched(grad, back, k)
        factor = torch.zeros_like(weights.reshape(-1)).index_copy(0, back, weights.reshape(-1))
        dots = (rows.float() * of_rows.float()).sum(dim=1).index_select(0, back)
        grad_rows = (factor.unsqueeze(1) * of_rows).to(rows.dtype)
        return grad_rows, dots.reshape(weights.shape).to(weights.dtype), None


@torch.library.impl("bfmoe::dispatch_cuda", "Autograd")
def _differentiable_dispatch(x: Tensor, back: Tensor, k: int) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dispatch.apply(x, back, k)
    with torch._C._AutoDispatchBelowAutograd():
        return dispatched(x, back, k)


@torch.library.impl("bfmoe::combine_cuda", "Autograd")
def _differentiable_combine(rows: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad):
        return _Combine.apply(rows, weights, back)
    with torch._C._AutoDispatchBelowAutograd():
        return combined(rows, weights, back)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.k = inputs[2]


def _backward_again(ctx: Any, grad: Tensor) -> tuple:
    return dispatched(grad, *ctx.saved_tensors, ctx.k), None, None  # the sum's gradient is a copy


torch.library.register_autograd(
    "bfmoe::dispatch_cuda_backward", _backward_again, setup_context=_setup
)
