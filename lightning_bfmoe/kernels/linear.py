"""One matrix of a packed layer for a few rows, in one call; the parts are the other kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.cpu import plan
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.library import library, missing_cpu
from lightning_bfmoe.kernels.ternary import layout_of

MAX_ROWS = 8
"""Most rows of the fused form: more of them share the tables of cosines that a rotation builds."""


class PackedLinear(NamedTuple):
    """The numbers of a packed `ButterflyLinear`; gains and bias may be None."""

    packed: Tensor  # trits, as `functional.pack_trits` writes them
    alpha: Tensor  # (d_out, 1) or (1, 1) float32
    d_in: int
    d_out: int
    bits: str
    angles_in: Tensor  # (experts, stages, pairs)
    angles_out: Tensor
    gain_in: Tensor | None  # (experts, d_in)
    gain_out: Tensor | None
    bias: Tensor | None  # (d_out,)


def packed_linear(
    x: Tensor,
    groups: ExpertGroups,
    linear: PackedLinear,
    parts: Callable[[Tensor, ExpertGroups], Tensor],
) -> Tensor:
    r"""All of a packed `ButterflyLinear` for a few rows, each by the numbers of its expert.

    .. math:: y = \operatorname{diag}(g^{out}) B(\phi) \operatorname{diag}(\alpha)\,T\,
       B(\theta)^T \operatorname{diag}(g^{in})\, x + b

    Args:
        x: Rows sorted by expert, (rows, d_in), any floating dtype.
        groups: Which expert each row belongs to.
        linear: The numbers of the layer.
        parts: Computes the same from its parts; called where no fused kernel suits.

    Returns:
        (rows, d_out) in the dtype of `x`. The fused form computes in float32 and rounds once.
    """
    return choose("linear", x, linear).run(x, groups, linear, parts)


def from_parts(
    x: Tensor,
    groups: ExpertGroups,
    linear: PackedLinear,
    parts: Callable[[Tensor, ExpertGroups], Tensor],
) -> Tensor:
    """Rotation, product and rotation as ops of their own."""
    return parts(x, groups)


def linear_cpu(
    x: Tensor,
    groups: ExpertGroups,
    linear: PackedLinear,
    parts: Callable[[Tensor, ExpertGroups], Tensor],
) -> Tensor:
    """All parts in one call to the compiled library."""
    packed, alpha, _, d_out, bits, *others = linear
    return fused(x.float(), groups.expert, packed, alpha, d_out, bits, *others).to(x.dtype)


def suits_fused(x: Tensor, linear: PackedLinear) -> bool:
    """Few rows on the CPU, in eager mode and without a gradient."""
    if torch.compiler.is_compiling() or not 0 < x.shape[0] <= MAX_ROWS:
        return False  # a compiled graph keeps the parts, which take any number of rows
    tensors = [x, *(t for t in linear if isinstance(t, Tensor))]
    if any(t.device.type != "cpu" or t.dtype == torch.float64 for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not missing_cpu()


torch.library.define(
    "bfmoe::packed_linear_cpu",
    "(Tensor x, Tensor expert, Tensor packed, Tensor alpha, int d_out, str bits, Tensor angles_in,"
    " Tensor angles_out, Tensor? gain_in, Tensor? gain_out, Tensor? bias) -> Tensor",
)
fused = torch.ops.bfmoe.packed_linear_cpu.default


@torch.library.impl("bfmoe::packed_linear_cpu", "CPU")
def _fused(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    alpha: Tensor,
    d_out: int,
    bits: str,
    angles_in: Tensor,
    angles_out: Tensor,
    gain_in: Tensor | None,
    gain_out: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    (rows, d_in), experts = x.shape, angles_in.shape[0]
    layout = layout_of(packed, d_out, d_in, bits)
    x, alpha, expert = x.contiguous(), alpha.contiguous(), expert.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    numbers, halves = [], 0
    for bit, values in enumerate((angles_in, angles_out, gain_in, gain_out)):
        if values is not None and values.dtype == torch.float16:
            halves |= 1 << bit
        elif values is not None:
            values = values.float()
        numbers.append(None if values is None else values.contiguous())
    y = x.new_empty(rows, d_out)
    pointers = [None if t is None else t.data_ptr() for t in (*numbers, bias)]
    failed = library().bfmoe_packed_linear(
        layout.data_ptr(), alpha.data_ptr(), 1 if alpha.numel() > 1 else 0,
        plan(d_in, angles_in.shape[1]), pointers[0],
        plan(d_out, angles_out.shape[1]), *pointers[1:],
        halves, expert.data_ptr(), x.data_ptr(), y.data_ptr(), rows, experts,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise ShapeError(
            f"experts are numbered from 0 to {experts - 1}",
            got=f"ids {expert.tolist()}",
            fix="Use functional.group_by_expert().",
        )
    return y


@torch.library.register_fake("bfmoe::packed_linear_cpu")
def _(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    alpha: Tensor,
    d_out: int,
    bits: str,
    angles_in: Tensor,
    angles_out: Tensor,
    gain_in: Tensor | None,
    gain_out: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], d_out)


register(
    Kernel(
        "linear",
        "parts",
        from_parts,
        lambda *_: True,
        "rotation, product and rotation by their own kernels; training, many rows, any device",
    )
)
register(
    Kernel(
        "linear",
        "cpu",
        linear_cpu,
        suits_fused,
        f"a packed matrix with its rotations in one call; CPU, up to {MAX_ROWS} rows, no gradient",
        missing=missing_cpu,
    )
)
