"""The op "blend a latent matrix towards its ternary form": the definition, or fused."""

import torch
from torch import Tensor

from lightning_bfmoe.functional.ternary import absmean_scale, quantize_ternary
from lightning_bfmoe.kernels.cuda import missing_triton
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.library import library, missing_cpu
from lightning_bfmoe.kernels.quantize_cuda import quantize_cuda, suits_quantize


def blend_to_ternary(
    weight: Tensor,
    blend: Tensor,
    scale: str = "lstsq",
    granularity: str = "row",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`functional.quantize_ternary` in `dtype`, by the fastest kernel.

    The CPU's gives the same numbers bit by bit. On CUDA a row is summed in another order, so its
    scale may differ in the last bits, and with it a trit whose |w| lies that near to alpha / 2.

    Example:
        >>> w = torch.tensor([[1.0, -0.9, 0.05]])
        >>> blend_to_ternary(w, torch.tensor(1.0))
        tensor([[ 0.9500, -0.9500,  0.0000]])

    Args:
        weight: Latent weights, (d_out, d_in).
        blend: Lambda, 0-d float32.
        scale: See `functional.ternarize`.
        granularity: See `functional.ternarize`.
        dtype: Of the result, rounded once; that of `weight` when None.

    Returns:
        The blended weight, same shape, with a straight-through gradient.
    """
    arguments = weight, blend, scale, granularity, dtype or weight.dtype
    return choose("quantize", *arguments).run(*arguments)


def quantize_reference(
    weight: Tensor, blend: Tensor, scale: str, granularity: str, dtype: torch.dtype
) -> Tensor:
    """The definition, pass by pass."""
    return quantize_ternary(weight, blend, scale, granularity).to(dtype)


def quantize_cpu(
    weight: Tensor, blend: Tensor, scale: str, granularity: str, dtype: torch.dtype
) -> Tensor:
    """One or two walks over each row in the compiled library; NumPy sorts, PyTorch averages."""
    return blended(weight, blend, scale, granularity == "row").to(dtype)


def suits_cpu(
    weight: Tensor, blend: Tensor, scale: str, granularity: str, dtype: torch.dtype
) -> bool:
    """A float32 matrix on the CPU."""
    return (
        weight.device.type == "cpu"
        and blend.device.type == "cpu"
        and weight.dtype == torch.float32
        and scale in ("lstsq", "absmean")
        and weight.numel() > 0
        and granularity in ("row", "tensor")
        and not missing_cpu()
    )


torch.library.define(
    "bfmoe::quantize_cpu", "(Tensor weight, Tensor blend, str scale, bool by_row) -> Tensor"
)
blended = torch.ops.bfmoe.quantize_cpu.default


@torch.library.impl("bfmoe::quantize_cpu", "CPU")
def _blended(weight: Tensor, blend: Tensor, scale: str, by_row: bool) -> Tensor:
    weight = weight.detach().contiguous()
    rows = weight.reshape(weight.shape[0] if by_row else 1, -1)
    out = torch.empty_like(weight)
    sizes = (*rows.shape, float(blend), torch.get_num_threads())
    if scale == "lstsq":
        ordered = rows.abs()
        ordered.numpy().sort(axis=1)  # in place, and several times faster than torch's
        library().bfmoe_quantize(weight.data_ptr(), ordered.data_ptr(), out.data_ptr(), *sizes)
    else:
        alpha = absmean_scale(rows)
        library().bfmoe_quantize_scaled(weight.data_ptr(), alpha.data_ptr(), out.data_ptr(), *sizes)
    return out


@torch.library.register_fake("bfmoe::quantize_cpu")
def _(weight: Tensor, blend: Tensor, scale: str, by_row: bool) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    return grad, None, None, None  # straight through


torch.library.register_autograd("bfmoe::quantize_cpu", _backward)

register(
    Kernel(
        "quantize",
        "reference",
        quantize_reference,
        lambda *_: True,
        "pass by pass in PyTorch; any device, dtype and scale",
    )
)
register(
    Kernel(
        "quantize",
        "cpu",
        quantize_cpu,
        suits_cpu,
        "compiled, the same numbers bit by bit; CPU, float32",
        missing=missing_cpu,
    )
)
register(
    Kernel(
        "quantize",
        "triton",
        quantize_cuda,
        suits_quantize,
        "fused, rounded to the product's dtype at once; CUDA with triton, float32 latents",
        missing=missing_triton,
    )
)
