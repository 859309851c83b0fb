"""Kernels that sort the (token, slot) pairs by expert: a stable counting sort in two launches.

The first counts the experts of every chunk of slots; the second adds those counts up, which places
each chunk's first slot of every expert, and counts ahead within its own chunk. A single chunk, as
in decoding, needs the second alone.

Imported only where triton is installed (`kernels.groups_cuda` does).
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl


@triton.jit
def _chosen(p_choice, slot, slots, experts):
    """The experts of these slots, and which slots exist and chose one that exists."""
    inside = slot < slots
    choice = tl.load(p_choice + slot, mask=inside, other=0)
    return choice.to(tl.int32), inside & (choice >= 0) & (choice < experts)


@triton.jit(do_not_specialize=["slots", "experts"])
def count_kernel(p_choice, p_part, slots, experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """part[c, e] = slots of chunk c that chose expert e."""
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    choice, inside = _chosen(p_choice, slot, slots, experts)
    counts = tl.histogram(choice, BINS, mask=inside)
    tl.store(p_part + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["slots", "experts", "chunks"])
def group_kernel(
    p_choice, p_part, p_order, p_expert, p_back, p_counts, slots, experts, chunks,
    CHUNK: tl.constexpr, BINS: tl.constexpr, BESIDE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Where each slot of a chunk stands: after all slots of lower experts and the earlier ones."""
    first = tl.program_id(0) * CHUNK
    slot = first + tl.arange(0, CHUNK)
    choice, inside = _chosen(p_choice, slot, slots, experts)
    tl.device_assert(inside | (slot >= slots), "an expert id is out of range")
    bins = tl.arange(0, BINS)
    if ALONE:
        total = tl.histogram(choice, BINS, mask=inside)
        start = tl.cumsum(total, axis=0) - total
    else:
        total = tl.zeros([BINS], tl.int32)
        earlier = tl.zeros([BINS], tl.int32)
        for chunk in range(0, chunks, BESIDE):
            number = chunk + tl.arange(0, BESIDE)
            at = p_part + number[:, None] * BINS + bins[None, :]
            part = tl.load(at, mask=(number < chunks)[:, None], other=0)
            total += tl.sum(part, axis=0)
            earlier += tl.sum(tl.where((number < tl.program_id(0))[:, None], part, 0), axis=0)
        start = tl.cumsum(total, axis=0) - total + earlier
    ahead = tl.zeros([CHUNK], tl.int32)
    for other in range(0, CHUNK, 16):
        beside = first + other + tl.arange(0, 16)
        theirs, there = _chosen(p_choice, beside, slots, experts)
        same = (theirs[None, :] == choice[:, None]) & (beside[None, :] < slot[:, None])
        ahead += tl.sum((same & there[None, :]).to(tl.int32), axis=1)
    row = tl.gather(start, tl.where(inside, choice, 0), 0) + ahead
    tl.store(p_order + row, slot.to(tl.int64), mask=inside)
    tl.store(p_expert + row, choice.to(tl.int64), mask=inside)
    tl.store(p_back + slot, row.to(tl.int64), mask=inside)
    tl.store(p_counts + bins, total.to(tl.int64), mask=bins < tl.where(first == 0, experts, 0))
