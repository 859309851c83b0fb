"""The op "multiply rows with a packed ternary matrix": dense, or looked up from the trits."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bfmoe.errors import BFMoEError, ShapeError
from lightning_bfmoe.functional.packing import unpack_trits
from lightning_bfmoe.functional.ternary import dequantize_ternary
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.library import library, missing_cpu

MAX_ROWS = {2: 16, 1: 16, 0: 4}
"""Most rows of the packed product by instruction set (`bfmoe_cpu_level`): with more, the dense one
is faster for some matrices (`benchmarks/cpu.py`; not measured for level 0)."""

_layouts = WeakTensorKeyDictionary()


def ternary_linear(
    x: Tensor, packed: Tensor, alpha: Tensor, d_out: int, bits: str, dense: Callable[..., Tensor]
) -> Tensor:
    r"""Multiply each row by diag(alpha) T, T given as packed trits; no activation is rounded.

    Example:
        >>> from lightning_bfmoe.functional.packing import pack_trits
        >>> trits, alpha = torch.tensor([[1, 0, -1]], dtype=torch.int8), torch.tensor([[0.5]])
        >>> packed = pack_trits(trits, "2")
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> ternary_linear(x, packed, alpha, 1, "2", lambda dtype: alpha.to(dtype) * trits)
        tensor([[-1.5000]])

    Args:
        x: Rows (rows, d_in), any floating dtype.
        packed: The trits of the (d_out, d_in) matrix T, as `functional.pack_trits` writes them.
        alpha: Scales, (d_out, 1) or (1, 1) float32.
        d_out: Rows of T.
        bits: `1.6` or `2`.
        dense: Gives the matrix diag(alpha) T in a dtype; called by the dense form only.

    Returns:
        (rows, d_out) in the dtype of `x`. The packed form sums in float32 and rounds once.
    """
    kernel = choose("ternary", x, packed)
    return kernel.run(x, packed, alpha, d_out, bits, dense)


def ternary_dense(
    x: Tensor, packed: Tensor, alpha: Tensor, d_out: int, bits: str, dense: Callable[..., Tensor]
) -> Tensor:
    """The definition: a product with the unpacked matrix."""
    return F.linear(x, dense(x.dtype))


def ternary_cpu(
    x: Tensor, packed: Tensor, alpha: Tensor, d_out: int, bits: str, dense: Callable[..., Tensor]
) -> Tensor:
    """Sums looked up by the trits, on the CPU."""
    return product(x.float(), packed, alpha, d_out, bits).to(x.dtype)


def suits_packed(x: Tensor, packed: Tensor) -> bool:
    """Few rows on the CPU without a gradient. A compiled graph serves all numbers of rows."""
    if x.device.type != "cpu" or packed.device.type != "cpu" or x.dtype == torch.float64:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False  # the backward pass wants the dense matrix
    if missing_cpu():
        return False
    return torch.compiler.is_compiling() or 0 < x.shape[0] <= MAX_ROWS[library().bfmoe_cpu_level()]


def layout_of(packed: Tensor, d_out: int, d_in: int, bits: str) -> Tensor:
    """The trits as this machine reads them; made once for a packed tensor and kept beside it."""
    version = 0 if packed.is_inference() else packed._version
    found = _layouts.get(packed)
    if found is None or found[0] != version:
        with torch.inference_mode(False):
            trits = unpack_trits(packed, (d_out, d_in), bits).contiguous()
            size = library().bfmoe_ternary_bytes(d_out, d_in)
            layout = torch.empty(size, dtype=torch.uint8)
            library().bfmoe_ternary_lay_out(trits.data_ptr(), d_out, d_in, layout.data_ptr())
        found = (version, layout)
        _layouts[packed] = found
    return found[1]


torch.library.define(
    "bfmoe::ternary_cpu", "(Tensor x, Tensor packed, Tensor alpha, int d_out, str bits) -> Tensor"
)
torch.library.define(
    "bfmoe::ternary_cpu_backward",
    "(Tensor grad, Tensor packed, Tensor alpha, int d_in, str bits) -> Tensor",
)
product = torch.ops.bfmoe.ternary_cpu.default
product_backward = torch.ops.bfmoe.ternary_cpu_backward.default


@torch.library.impl("bfmoe::ternary_cpu", "CPU")
def _product(x: Tensor, packed: Tensor, alpha: Tensor, d_out: int, bits: str) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.float32 or alpha.dtype != torch.float32:
        raise ShapeError(
            "the packed product takes float32 rows as a (rows, d_in) matrix, and float32 scales",
            got=f"x {tuple(x.shape)} {x.dtype}, alpha {alpha.dtype}",
            fix="Call kernels.ternary_linear, which converts.",
        )
    x, alpha = x.contiguous(), alpha.contiguous()
    layout = layout_of(packed, d_out, x.shape[1], bits)
    y = x.new_empty(x.shape[0], d_out)
    step = 1 if alpha.numel() > 1 else 0
    library().bfmoe_ternary_linear(
        layout.data_ptr(), alpha.data_ptr(), step, x.data_ptr(), y.data_ptr(),
        x.shape[0], d_out, x.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y


@torch.library.register_fake("bfmoe::ternary_cpu")
def _(x: Tensor, packed: Tensor, alpha: Tensor, d_out: int, bits: str) -> Tensor:
    return x.new_empty(x.shape[0], d_out)


@torch.library.impl("bfmoe::ternary_cpu_backward", "CPU")
def _product_backward(grad: Tensor, packed: Tensor, alpha: Tensor, d_in: int, bits: str) -> Tensor:
    trits = unpack_trits(packed, (grad.shape[1], d_in), bits)
    return grad @ dequantize_ternary(trits, alpha, grad.dtype)


@torch.library.register_fake("bfmoe::ternary_cpu_backward")
def _(grad: Tensor, packed: Tensor, alpha: Tensor, d_in: int, bits: str) -> Tensor:
    return grad.new_empty(grad.shape[0], d_in)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, packed, alpha, _, bits = inputs
    ctx.save_for_backward(packed, alpha)
    ctx.d_in, ctx.bits = x.shape[1], bits  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    if ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
        raise BFMoEError(
            "the scales of a packed matrix are not trained",
            got="alpha.requires_grad=True",
            fix="Train the latent model, then pack it again.",
        )
    packed, alpha = ctx.saved_tensors  # type: ignore[attr-defined]
    return product_backward(grad, packed, alpha, ctx.d_in, ctx.bits), None, None, None, None  # type: ignore[attr-defined]


torch.library.register_autograd("bfmoe::ternary_cpu", _backward, setup_context=_setup)

register(
    Kernel(
        "ternary",
        "dense",
        ternary_dense,
        lambda *_: True,
        "product with the unpacked matrix; many rows, gradients, any device",
    )
)
register(
    Kernel(
        "ternary",
        "cpu",
        ternary_cpu,
        suits_packed,
        "sums looked up by the packed trits; CPU, a few rows, no gradient",
        missing=missing_cpu,
    )
)
