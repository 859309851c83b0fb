"""The fused rotation on the CPU: an opaque torch op around the compiled `csrc/rotate.cpp`."""

import functools

import torch
from torch import Tensor

from lightning_bfmoe.errors import BFMoEError, ShapeError
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.library import library, missing_cpu

_NAMES = {torch.float32: "f32", torch.float64: "f64"}


def suits_cpu(x: Tensor, angles: Tensor, groups: ExpertGroups) -> bool:
    """CPU tensors, any width and number of rows, where the library is compiled in."""
    tensors = (x, angles, groups.counts)
    return all(t.device.type == "cpu" for t in tensors) and not missing_cpu()


def rotate_cpu(x: Tensor, angles: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
    """Rotate sorted rows by their expert's angles; same function as `kernels.rotation.rotate`.

    Args:
        x: (rows, d), float32 or float64.
        angles: (experts, stages, pairs), same dtype.
        groups: Which expert each row belongs to.
        inverse: Apply the transpose.
    """
    return rotation(x, angles, groups.counts, inverse)


@functools.lru_cache(maxsize=256)
def plan(d: int, stages: int) -> int:
    """The network of one width, made by the library and kept until the process ends."""
    return library().bfmoe_plan(d, stages)


def _call(name: str, x: Tensor, angles: Tensor, counts: Tensor, inverse: bool, *others: Tensor):
    """Hand contiguous tensors to the library: `others` are (input gradients..., outputs...)."""
    (rows, d), (experts, stages, _) = x.shape, angles.shape
    network = plan(d, stages)
    function = getattr(library(), f"{name}_{_NAMES[x.dtype]}")
    counts = counts.to(torch.int64).contiguous()
    outputs = 1 if len(others) == 1 else 2
    tensors = [x, *others[:-outputs], angles, counts, *others[-outputs:]]
    failed = function(
        network, *(t.data_ptr() for t in tensors), rows, experts, inverse, torch.get_num_threads()
    )
    if failed:
        raise ShapeError(
            "the counts of the experts add up to the rows",
            got=f"counts {counts.tolist()} for {rows} rows",
            fix="Use functional.group_by_expert().",
        )


# Defined by hand, not by `custom_op`: for a few rows that wrapper costs more than the rotation.
torch.library.define(
    "bfmoe::rotate_cpu", "(Tensor x, Tensor angles, Tensor counts, bool inverse) -> Tensor"
)
torch.library.define(
    "bfmoe::rotate_cpu_backward",
    "(Tensor y, Tensor grad, Tensor angles, Tensor counts, bool inverse) -> (Tensor, Tensor)",
)
rotation = torch.ops.bfmoe.rotate_cpu.default
rotation_backward = torch.ops.bfmoe.rotate_cpu_backward.default


@torch.library.impl("bfmoe::rotate_cpu", "CPU")
def _rotation(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    x, angles = x.contiguous(), angles.contiguous()
    y = torch.empty_like(x)
    _call("bfmoe_rotate", x, angles, counts, inverse, y)
    return y


@torch.library.register_fake("bfmoe::rotate_cpu")
def _(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("bfmoe::rotate_cpu_backward", "CPU")
def _rotation_backward(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, grad, angles = y.contiguous(), grad.contiguous(), angles.contiguous()
    dx, dangles = torch.empty_like(y), torch.empty_like(angles)
    _call("bfmoe_rotate_backward", y, angles, counts, inverse, grad, dx, dangles)
    return dx, dangles


@torch.library.register_fake("bfmoe::rotate_cpu_backward")
def _(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(y, memory_format=contiguous),
        torch.empty_like(angles, memory_format=contiguous),
    )


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, angles, counts, inverse = inputs
    ctx.save_for_backward(output, angles, counts)
    ctx.inverse = inverse  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    y, angles, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    inverse = ctx.inverse  # type: ignore[attr-defined]
    if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        return rotation(grad, angles, counts, not inverse), None, None, None
    dx, dangles = rotation_backward(y, grad, angles, counts, inverse)
    return dx, dangles, None, None


def _no_second(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple:
    raise BFMoEError(
        "the compiled CPU rotation has no second derivative",
        got="a backward pass through its backward pass",
        fix='Run the model under lightning_bfmoe.kernels.use_kernel("rotate", "blocks").',
    )


torch.library.register_autograd("bfmoe::rotate_cpu", _backward, setup_context=_setup)
torch.library.register_autograd("bfmoe::rotate_cpu_backward", _no_second)
