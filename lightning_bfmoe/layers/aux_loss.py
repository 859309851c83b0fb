"""Auxiliary losses that act from inside a layer: no loss term in the user's training step."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def attach_loss(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    r"""Return `output` unchanged and add ``scale * loss`` to what is differentiated through it.

    In the backward pass `loss` receives the gradient `scale`, as if the root had been
    ``root + scale * loss``. `scale` is read when the backward pass runs, so it may be set after the
    forward pass: to s / n for a root that was multiplied by a GradScaler's s and divided by n
    accumulated micro-batches (`ButterflyMoECallback` does that; in your own loop call
    `layers.set_loss_scale`).

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> y = attach_loss(torch.zeros(2, requires_grad=True), w * w, torch.tensor(0.5))
        >>> y.sum().backward()
        >>> w.grad.item()
        3.0

    Args:
        output: The layer's output, any shape.
        loss: 0-d, differentiable.
        scale: 0-d, no gradient.

    Source: the idea is Megatron-LM's MoE aux-loss scaler; the late-read scale ours.
    """
    return _AttachLoss.apply(output, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        # not saved for backward: it may change until then
        ctx.scale = scale  # type: ignore[attr-defined]
        ctx.loss_dtype = loss.dtype  # type: ignore[attr-defined]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.scale.to(ctx.loss_dtype), None  # type: ignore[attr-defined]
