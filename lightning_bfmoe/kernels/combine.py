"""The op "add up the rows of each token's experts": the definition, or fused."""

import torch
from torch import Tensor

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.functional.routing import combine as combine_reference
from lightning_bfmoe.kernels.cuda import missing_triton
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.library import library, missing_cpu
from lightning_bfmoe.kernels.rows_cuda import combine_cuda, suits_combine


def combine(rows: Tensor, weights: Tensor, groups: ExpertGroups) -> Tensor:
    """`functional.combine`, by the fastest kernel.

    Args:
        rows: Rows sorted by expert, (tokens * k, d).
        weights: Routing weights, (tokens, k).
        groups: The order of the rows.

    Returns:
        (tokens, d) in the dtype of `rows`.
    """
    return choose("combine", rows, weights, groups).run(rows, weights, groups)


def combine_cpu(rows: Tensor, weights: Tensor, groups: ExpertGroups) -> Tensor:
    """One walk over the rows in the compiled library, forward and backward."""
    return combined(rows, weights, groups.order)


def suits_cpu(rows: Tensor, weights: Tensor, groups: ExpertGroups) -> bool:
    """Float32 rows and weights on the CPU."""
    return (
        rows.device.type == "cpu"
        and weights.device.type == "cpu"
        and rows.dtype == torch.float32
        and weights.dtype == torch.float32
        and not missing_cpu()
    )


torch.library.define("bfmoe::combine_cpu", "(Tensor rows, Tensor weights, Tensor order) -> Tensor")
torch.library.define(
    "bfmoe::combine_cpu_backward",
    "(Tensor grad, Tensor rows, Tensor weights, Tensor order) -> (Tensor, Tensor)",
)
combined = torch.ops.bfmoe.combine_cpu.default
combined_backward = torch.ops.bfmoe.combine_cpu_backward.default


def _call(name: str, inputs: list[Tensor], outputs: list[Tensor], weights: Tensor, d: int) -> None:
    tokens, k = weights.shape
    pointers = [t.data_ptr() for t in (*inputs, *outputs)]
    failed = getattr(library(), name)(*pointers, tokens, k, d, torch.get_num_threads())
    if failed:
        raise ShapeError(
            "groups.order is a permutation of the slots",
            got=f"{inputs[-1].tolist()}",
            fix="Use functional.group_by_expert().",
        )


@torch.library.impl("bfmoe::combine_cpu", "CPU")
def _combined(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    if rows.shape[0] != weights.numel() or order.shape[0] != weights.numel():
        raise ShapeError(
            "combine takes a row for each slot of the (tokens, k) choice",
            got=f"{rows.shape[0]} rows, {order.shape[0]} places, weights {tuple(weights.shape)}",
            fix="Pass the groups that the rows were dispatched with.",
        )
    inputs = [rows.contiguous(), weights.contiguous(), order.contiguous()]
    y = rows.new_empty(weights.shape[0], rows.shape[1])
    _call("bfmoe_combine", inputs, [y], weights, rows.shape[1])
    return y


@torch.library.register_fake("bfmoe::combine_cpu")
def _(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


@torch.library.impl("bfmoe::combine_cpu_backward", "CPU")
def _combined_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    inputs = [grad.contiguous(), rows.contiguous(), weights.contiguous(), order.contiguous()]
    outputs = [torch.empty_like(inputs[1]), torch.empty_like(inputs[2])]
    _call("bfmoe_combine_backward", inputs, outputs, weights, rows.shape[1])
    return outputs[0], outputs[1]


@torch.library.register_fake("bfmoe::combine_cpu_backward")
def _(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(rows, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    rows, weights, order = ctx.saved_tensors  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():
        return *combined_backward(grad, rows, weights, order), None
    of_rows = grad.index_select(0, order // weights.shape[1])  # a second derivative is wanted
    grad_rows = weights.reshape(-1)[order].unsqueeze(1) * of_rows
    products = (rows * of_rows).sum(dim=1)
    grad_weights = torch.zeros_like(products).index_copy(0, order, products)
    return grad_rows, grad_weights.reshape(weights.shape), None


torch.library.register_autograd("bfmoe::combine_cpu", _backward, setup_context=_setup)

register(
    Kernel(
        "combine",
        "reference",
        combine_reference,
        lambda *_: True,
        "gather and a batched product; any device and dtype",
    )
)
register(
    Kernel(
        "combine",
        "cpu",
        combine_cpu,
        suits_cpu,
        "compiled, one walk over the rows; CPU, float32",
        missing=missing_cpu,
    )
)
register(
    Kernel(
        "combine",
        "triton",
        combine_cuda,
        suits_combine,
        "one launch, and one for both gradients; CUDA with triton, not double",
        missing=missing_triton,
    )
)
