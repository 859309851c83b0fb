"""The ops "logits of the router" and "choice of the experts": the definitions, or fused on CUDA."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bfmoe.functional.routing import TopK, expert_load, route_top_k
from lightning_bfmoe.kernels.cuda import has_triton, missing_triton, on_device
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register

MAX_EXPERTS = 4096  # logits that a program holds
MAX_TOKENS = 32
"""Most tokens whose logits are computed one by one."""


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """W x in the dtype of the weight, by the fastest kernel.

    Example:
        >>> router_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])

    Args:
        x: (tokens, d), any floating dtype.
        weight: (experts, d), float32 or wider.

    Returns:
        (tokens, experts).
    """
    return choose("logits", x, weight).run(x, weight)


def logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Widen, then a product."""
    return F.linear(x.to(weight.dtype), weight)


def logits_cuda(x: Tensor, weight: Tensor) -> Tensor:
    """One launch; no gradient."""
    return scored(x, weight)


def suits_logits(x: Tensor, weight: Tensor) -> bool:
    """A few tokens on CUDA with triton, in eager mode and without a gradient."""
    if not (x.is_cuda and weight.is_cuda) or torch.compiler.is_compiling() or not has_triton():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    fits = weight.dtype == torch.float32 and x.dtype != torch.float64
    return fits and 0 < x.shape[0] <= MAX_TOKENS


def route(logits: Tensor, k: int, balance_bias: Tensor | None) -> tuple[TopK, Tensor]:
    """`functional.route_top_k` and the load, by the fastest kernel.

    Example:
        >>> choice, load = route(torch.tensor([[0.0, 2.0, 1.0]]), 2, None)
        >>> choice.experts.tolist(), load.tolist()
        ([[1, 2]], [0, 1, 1])

    Args:
        logits: (tokens, experts) float32 or wider.
        k: Experts a token.
        balance_bias: (experts,) or None.

    Returns:
        The choice, and the slots of each expert, (experts,) int64, without those whose weight is
        not finite: top-k takes NaN for the largest score, and it must not reach the balance.
    """
    return choose("route", logits, k, balance_bias).run(logits, k, balance_bias)


def route_reference(logits: Tensor, k: int, balance_bias: Tensor | None) -> tuple[TopK, Tensor]:
    """The definition, operation by operation."""
    choice = route_top_k(logits, k, balance_bias)
    return choice, expert_load(choice.experts, logits.shape[1], choice.weights.isfinite())


def route_cuda(logits: Tensor, k: int, balance_bias: Tensor | None) -> tuple[TopK, Tensor]:
    """One launch; no gradient."""
    *choice, load = routed(logits, k, balance_bias)
    return TopK(*choice), load


def suits_route(logits: Tensor, k: int, balance_bias: Tensor | None) -> bool:
    """Float32 logits on CUDA with triton, in eager mode and without a gradient."""
    if not logits.is_cuda or torch.compiler.is_compiling() or not has_triton():
        return False
    return is_fused(logits, k, balance_bias)


def is_fused(logits: Tensor, k: int, balance_bias: Tensor | None) -> bool:
    """Whether the fused kernel can do these numbers, on whatever device."""
    if logits.requires_grad and torch.is_grad_enabled():
        return False
    if balance_bias is not None and balance_bias.dtype != torch.float32:
        return False
    tokens, experts = logits.shape
    return logits.dtype == torch.float32 and tokens > 0 and 1 <= k <= experts <= MAX_EXPERTS


torch.library.define("bfmoe::router_logits_cuda", "(Tensor x, Tensor weight) -> Tensor")
scored = torch.ops.bfmoe.router_logits_cuda.default
torch.library.define(
    "bfmoe::route_cuda",
    "(Tensor logits, int k, Tensor? balance_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
routed = torch.ops.bfmoe.route_cuda.default


# On the CPU these run under triton's interpreter only; no `suits_*` chooses them there.
@torch.library.impl("bfmoe::router_logits_cuda", ("CUDA", "CPU"))
@on_device
def _scored(x: Tensor, weight: Tensor) -> Tensor:
    from lightning_bfmoe.kernels.triton_route import logits_kernel

    x, weight, (experts, width) = x.contiguous(), weight.contiguous(), weight.shape
    logits, block = x.new_empty(x.shape[0], experts, dtype=torch.float32), 4
    logits_kernel[(x.shape[0], -(-experts // block))](
        x, weight, logits, WIDTH=width, EXPERTS=experts, BLOCK=block,
        BLOCK_IN=min(512, 1 << (width - 1).bit_length()), num_warps=4,
    )  # fmt: skip
    return logits


@torch.library.register_fake("bfmoe::router_logits_cuda")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.impl("bfmoe::route_cuda", ("CUDA", "CPU"))
@on_device
def _routed(
    logits: Tensor, k: int, balance_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lightning_bfmoe.kernels.triton_route import route_kernel

    logits, (tokens, num_experts) = logits.contiguous(), logits.shape
    experts = logits.new_empty(tokens, k, dtype=torch.int64)
    weights, probs = logits.new_empty(tokens, k), torch.empty_like(logits)
    load = logits.new_zeros(num_experts, dtype=torch.int64)
    bias = logits if balance_bias is None else balance_bias.contiguous()
    block = 1 << (num_experts - 1).bit_length()
    route_kernel[(tokens,)](
        logits, bias, experts, weights, probs, load, tokens, EXPERTS=num_experts, K=k,
        BALANCED=balance_bias is not None, BLOCK=block, num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return experts, weights, probs, load


@torch.library.register_fake("bfmoe::route_cuda")
def _(logits: Tensor, k: int, balance_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choice = logits.new_empty(logits.shape[0], k)
    return (
        torch.empty_like(choice, dtype=torch.int64),
        choice,
        torch.empty_like(logits),
        logits.new_empty(logits.shape[1], dtype=torch.int64),
    )


register(
    Kernel(
        "logits",
        "reference",
        logits_reference,
        lambda *_: True,
        "a product in float32; any device and gradient",
    )
)
register(
    Kernel(
        "logits",
        "triton",
        logits_cuda,
        suits_logits,
        f"one launch; CUDA with triton, up to {MAX_TOKENS} tokens, no gradient",
        missing=missing_triton,
    )
)
register(
    Kernel(
        "route",
        "reference",
        route_reference,
        lambda *_: True,
        "operation by operation; any device, dtype and gradient",
    )
)
register(
    Kernel(
        "route",
        "triton",
        route_cuda,
        suits_route,
        f"one launch; CUDA with triton, float32, up to {MAX_EXPERTS} experts, no gradient",
        missing=missing_triton,
    )
)
