"""The router of a few tokens in two launches: logits; then softmax, top-k, weights and load."""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl


@triton.jit
def logits_kernel(
    p_x, p_weight, p_logits,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (token, block): the logits of a block of experts, in float32."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK_IN), tl.float32)
    for first in range(0, WIDTH, BLOCK_IN):
        column = first + tl.arange(0, BLOCK_IN)
        x = tl.load(p_x + token * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        there = (expert < EXPERTS)[:, None] & (column < WIDTH)[None, :]
        at = expert[:, None] * WIDTH + column[None, :]
        sums += tl.load(p_weight + at, mask=there, other=0.0) * x[None, :]
    tl.store(p_logits + token * EXPERTS + expert, tl.sum(sums, axis=1), mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    p_logits, p_bias, p_experts, p_weights, p_probs, p_load, tokens,
    EXPERTS: tl.constexpr, K: tl.constexpr, BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `functional.route_top_k`; of equal scores the lower expert comes first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    there = expert < EXPERTS
    logits = tl.load(p_logits + token * EXPERTS + expert, mask=there, other=float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0))
    tl.store(p_probs + token * EXPERTS + expert, powers / tl.sum(powers, axis=0), mask=there)
    score = logits
    if BALANCED:
        score = tl.sigmoid(logits) + tl.load(p_bias + expert, mask=there, other=0.0)
    # NaN counts as the largest, and below every score lie those that are taken already.
    score = tl.where(score != score, float("inf"), tl.maximum(score, -3.0e38))
    score = tl.where(there, score, float("-inf"))
    slot_of = tl.full((BLOCK,), -1, tl.int32)
    for slot in tl.static_range(K):
        best = tl.argmax(score, axis=0)
        tl.store(p_experts + token * K + slot, best.to(tl.int64))
        slot_of = tl.where(expert == best, slot, slot_of)
        score = tl.where(expert == best, float("-inf"), score)
    chosen = slot_of >= 0
    largest = tl.max(tl.where(chosen, logits, float("-inf")), axis=0)
    powers = tl.where(chosen, tl.exp(logits - largest), 0.0)
    weights = powers / tl.sum(powers, axis=0)
    tl.store(p_weights + token * K + slot_of, weights, mask=chosen)
    finite = (weights == weights) & (tl.abs(weights) < float("inf"))
    tl.atomic_add(p_load + expert, 1, mask=chosen & finite)
