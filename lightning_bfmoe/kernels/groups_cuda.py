"""Sorting the slots by expert on CUDA: an opaque torch op around `triton_groups`."""

import functools

import torch
from torch import Tensor

from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels.cuda import has_triton, on_device
from lightning_bfmoe.kernels.cuda_plan import Call

MAX_SLOTS = 2**20  # beyond, the chunks' counts cost more than torch's sort
MAX_EXPERTS = 1024
CHUNK = 256  # slots of a program


def suits_group(experts: Tensor, num_experts: int) -> bool:
    """Expert ids on CUDA, with triton, up to `MAX_SLOTS` of them and `MAX_EXPERTS` experts."""
    return (
        experts.is_cuda
        and experts.dtype == torch.int64
        and experts.numel() <= MAX_SLOTS
        and num_experts <= MAX_EXPERTS
        and has_triton()
    )


def group_cuda(experts: Tensor, num_experts: int) -> ExpertGroups:
    """`functional.group_by_expert` with the inverse order; no wait for the GPU.

    An id that is out of range stops the device with an assertion, as torch's own ops do.
    """
    order, expert, back, counts = grouped(experts, num_experts)
    return ExpertGroups(order, expert, counts, back)


torch.library.define(
    "bfmoe::group_cuda", "(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)"
)
grouped = torch.ops.bfmoe.group_cuda.default


class _Plan:
    """The kernels for one number of experts, with one chunk of slots (alone) or with several."""

    def __init__(self, num_experts: int, chunk: int, alone: bool) -> None:
        from lightning_bfmoe.kernels import triton_groups

        self.bins = max(1 << (num_experts - 1).bit_length(), 32)
        self.chunk = chunk
        sizes = {"CHUNK": chunk, "BINS": self.bins, "ALONE": alone}
        sizes["BESIDE"] = max(2048 // self.bins, 1)
        options = {"num_warps": 4, "debug": True, "sanitize_overflow": False}  # for the assertion
        self.count = Call(triton_groups.count_kernel, sizes, **options)
        self.group = Call(triton_groups.group_kernel, sizes, **options)


@functools.lru_cache(maxsize=64)
def _plan(num_experts: int, chunk: int, alone: bool, device: torch.device) -> _Plan:
    return _Plan(num_experts, chunk, alone)


@torch.library.impl("bfmoe::group_cuda", ("CUDA", "CPU"))  # the CPU under triton's interpreter only
@on_device
def _grouped(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = experts.reshape(-1).contiguous()
    slots = flat.shape[0]
    order, expert, back = (torch.empty_like(flat) for _ in range(3))
    if slots == 0:
        return order, expert, back, flat.new_zeros(num_experts)
    counts = flat.new_empty(num_experts)
    chunks = -(-slots // CHUNK)
    plan = _plan(num_experts, 64 if slots <= 64 else CHUNK, chunks == 1, flat.device)
    part = counts
    if chunks > 1:
        part = torch.empty(chunks * plan.bins, dtype=torch.int32, device=flat.device)
        pair = flat, part
        addresses = tuple(t.data_ptr() for t in pair)
        plan.count((chunks, 1, 1), addresses, lambda: pair, slots, num_experts)
    tensors = flat, part, order, expert, back, counts
    addresses = tuple(t.data_ptr() for t in tensors)
    plan.group((chunks, 1, 1), addresses, lambda: tensors, slots, num_experts, chunks)
    return order, expert, back, counts


@torch.library.register_fake("bfmoe::group_cuda")
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = experts.reshape(-1)
    order, expert, back = (flat.new_empty(flat.shape) for _ in range(3))
    return order, expert, back, flat.new_empty(num_experts)
