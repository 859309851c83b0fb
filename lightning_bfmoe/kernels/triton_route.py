"""The choice of experts in one launch: softmax, top-k, weights and load of a token a program."""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language as tl


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
