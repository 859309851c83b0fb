"""The fused rotation on CUDA: an opaque torch op around the Triton kernels.

A width of 2^q m (m odd) has q regular stages, which pair columns at a power-of-two distance, and
irregular ones for m > 1. Up to `MAX_IRREGULAR` of those run fused too; a width with more of them
(all odd ones from 7 on, for example) applies them one by one in plain PyTorch.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.errors import BFMoEError
from lightning_bfmoe.functional.butterfly import stage_pairs
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.blocks import irregular_stages

MAX_FUSED = 8192  # a row must fit the registers of one program
MAX_IRREGULAR = 4
LIFT = True  # three shears a pair instead of the definition's four instructions


class Launch(NamedTuple):
    """How a kernel is spread over the GPU; `benchmarks/rotation_cuda.py --tune` compares them."""

    spread: int  # log2 of the columns of one row that a thread holds
    rows: int  # rows that a thread holds
    warps: int  # warps of a program
    resident: int  # programs on one multiprocessor
    registers: int | None = None  # at most, for each thread


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed, with Gluon (3.6 and later)."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False


def suits_cuda(x: Tensor, angles: Tensor, groups: ExpertGroups) -> bool:
    """CUDA rows that are not double, with triton; at least some stages can be fused."""
    if not x.is_cuda or torch.float64 in (x.dtype, angles.dtype) or x.shape[1] > MAX_FUSED:
        return False
    return sum(fused_stages(x.shape[1], angles.shape[1])) > 0 and has_triton()


def fused_stages(width: int, stages: int) -> tuple[int, int]:
    """(regular, irregular) stages that run fused.

    Example:
        >>> fused_stages(512, 9), fused_stages(768, 10), fused_stages(130, 8), fused_stages(512, 4)
        ((9, 0), (8, 2), (1, 0), (4, 0))
    """
    regular = min((width & -width).bit_length() - 1, stages)
    irregular = stages - regular
    return regular, irregular if irregular <= MAX_IRREGULAR else 0


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
    if inverse:
        x = irregular_stages(x.float(), angles, groups, fused, inverse).to(dtype)
    x = rotation(x, angles[:, :fused], groups.counts, inverse)
    if not inverse:
        x = irregular_stages(x.float(), angles, groups, fused, inverse).to(dtype)
    return x


def launch_shape(log_d: int, irregular: int, backward: bool, itemsize: int) -> Launch:
    """The fastest of those compared that spills no registers, by the padded width 2^log_d."""
    spread = min(4, log_d)
    if irregular and (backward or log_d == 9):
        spread = min(3, log_d)  # from two warps on partners are fetched through shared memory
    warps = max(2**log_d >> (5 + spread), 1)
    if warps == 16:  # 128 registers a thread at most
        return Launch(spread, 1 if backward else 2, warps, 1)
    if not backward:
        return Launch(spread, 4, warps, 16 // warps, 160 if irregular else None)
    if irregular:
        return Launch(spread, 2, warps, max(12 // warps, 1), 168)
    if log_d == 10 and itemsize == 4:
        return Launch(3, 2, 4, 3, 160)
    if log_d == 9 and itemsize == 4:
        return Launch(spread, 1, warps, 10, 200)
    if log_d == 12:
        return Launch(spread, 1, warps, 1)
    return Launch(spread, 2, warps, max(8 // warps, 1), 240 if log_d < 11 else None)


def walk_parts(regular: int, irregular: int, down: bool, launch: Launch) -> list[tuple[int, int]]:
    """Cut the backward walk where the sums of angle gradients would no longer fit the registers.

    Example:
        >>> walk_parts(13, 0, True, Launch(spread=4, rows=1, warps=16, resident=1))
        [(0, 4), (4, 8), (8, 12), (12, 13)]
    """
    room = 32 if launch.warps > 8 else 128
    own = [2 ** (launch.spread - 1)] * regular + [2**launch.spread] * irregular  # registers
    if down:
        own.reverse()
    parts, first, used = [], 0, 0
    for stage, registers in enumerate(own):
        if stage > first and used + registers > room:
            parts.append((first, stage))
            first, used = stage, 0
        used += registers
    return [*parts, (first, len(own))]


@functools.lru_cache(maxsize=256)
def _irregular_tables(
    width: int, stages: int, regular: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each column in each irregular stage: its partner, and its pair if it is the first member.

    Both (irregular, 2^ceil(log2 width)), int32; a column without a pair is its own partner.
    """
    size = 1 << (width - 1).bit_length()
    partner = torch.arange(size, dtype=torch.int32).repeat(stages - regular, 1)
    pair = torch.full_like(partner, -1)
    first, second = stage_pairs(width, stages)
    for row in range(stages - regular):
        a, b = first[regular + row], second[regular + row]
        partner[row, a], partner[row, b] = b.int(), a.int()
        pair[row, a] = torch.arange(width // 2, dtype=torch.int32)
    return partner.to(device), pair.to(device)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # under the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Plan(NamedTuple):
    """What both directions launch with."""

    launch: Launch
    programs: int
    table: Tensor
    rows: Tensor
    partner: Tensor
    pair: Tensor
    constants: dict
    options: dict


def _prepare(x: Tensor, angles: Tensor, counts: Tensor, down: bool, backward: bool) -> _Plan:
    """Fill the coefficient table and the row plan, in one small launch."""
    from lightning_bfmoe.kernels.triton_tables import prepare_kernel

    (rows, width), (experts, stages, _) = x.shape, angles.shape
    regular, irregular = fused_stages(width, stages)
    log_d = (width - 1).bit_length()
    launch = launch_shape(log_d, irregular, backward, x.element_size())
    height = launch.rows * max((32 * launch.warps << launch.spread) >> log_d, 1)
    lift = LIFT and regular > 0
    block, d = 256, 1 << log_d
    table = x.new_empty(experts, regular + 1 + 2 * irregular, d, dtype=torch.float32)
    plan = counts.new_empty(2 * experts + 1, dtype=torch.int32)
    partner = pair = plan  # never read without irregular stages
    if irregular:
        partner, pair = _irregular_tables(width, stages, regular, x.device)
    constants = {
        "WIDTH": width, "LOG_D": log_d, "REGULAR": regular, "IRREGULAR": irregular, "DOWN": down,
        "LIFT": lift,
    }  # fmt: skip
    blocks = -(-regular * d // (2 * block)) + -(-d // block) + -(-irregular * d // block)
    prepare_kernel[(experts, blocks)](
        angles, counts.contiguous(), partner, pair, table, plan, experts, height,
        **constants, BLOCK=block, WARPS=4, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    constants |= {"SPREAD": launch.spread, "ROWS": launch.rows, "WARPS": launch.warps}
    programs = min(_multiprocessors(x.device) * launch.resident, rows // height + experts)
    options = {
        "num_warps": launch.warps, "maxnreg": launch.registers, "enable_fp_fusion": True,
    }  # fmt: skip
    return _Plan(launch, programs, table, plan, partner, pair, constants, options)


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


@torch.library.impl("bfmoe::rotate_cuda", _DEVICES)
def _rotation(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    from lightning_bfmoe.kernels.triton_rotation import rotate_kernel

    x, angles = x.contiguous(), angles.contiguous()
    plan = _prepare(x, angles, counts, inverse, backward=False)
    y = torch.empty_like(x)
    rotate_kernel[(plan.programs,)](
        x, y, plan.table, plan.partner, plan.rows, angles.shape[0],
        **plan.constants, **plan.options,
    )  # fmt: skip
    return y


@torch.library.register_fake("bfmoe::rotate_cuda")
def _(x: Tensor, angles: Tensor, counts: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("bfmoe::rotate_cuda_backward", _DEVICES)
def _rotation_backward(
    y: Tensor, grad: Tensor, angles: Tensor, counts: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    from lightning_bfmoe.kernels.triton_rotation import rotate_back_kernel
    from lightning_bfmoe.kernels.triton_tables import collect_kernel

    y, grad, angles = y.contiguous(), grad.contiguous(), angles.contiguous()
    experts, stages, pairs = angles.shape
    plan = _prepare(y, angles, counts, not inverse, backward=True)
    dx, dangles = torch.empty_like(y), torch.empty_like(angles)
    scratch = y.new_empty(plan.programs + experts, stages, pairs, dtype=torch.float32)
    sizes = plan.constants
    for first, stop in walk_parts(sizes["REGULAR"], sizes["IRREGULAR"], sizes["DOWN"], plan.launch):
        rotate_back_kernel[(plan.programs,)](
            y, grad, dx, scratch, plan.table, plan.partner, plan.pair, plan.rows, experts,
            **sizes, FIRST=first, STOP=stop, **plan.options,
        )  # fmt: skip
    spread, rows, warps = plan.launch[:3]
    collect_kernel[(experts, -(-stages * pairs // 128))](
        scratch, angles, plan.rows, dangles, experts, plan.programs,
        WIDTH=sizes["WIDTH"], REGULAR=sizes["REGULAR"], IRREGULAR=sizes["IRREGULAR"],
        HEIGHT=rows * max((32 * warps << spread) >> sizes["LOG_D"], 1),
        DOWN=sizes["DOWN"], LIFT=sizes["LIFT"], PIECES=32, BLOCK=128, WARPS=4, num_warps=4,
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
        "the fused rotation has no second derivative",
        got="a backward pass through its backward pass",
        fix='Run the model under lightning_bfmoe.kernels.use_kernel("rotate", "blocks").',
    )


torch.library.register_autograd("bfmoe::rotate_cuda", _backward, setup_context=_setup)
torch.library.register_autograd("bfmoe::rotate_cuda_backward", _no_second)
