"""Routing: which expert takes which token, how evenly, and in which order the rows are computed."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_bfmoe.errors import ConfigError


class TopK(NamedTuple):
    """Choice of experts for each token."""

    experts: Int[Tensor, "tokens k"]  # expert ids, best first
    weights: Float[Tensor, "tokens k"]  # non-negative, sum to 1 over k
    probs: Float[Tensor, "tokens experts"]  # softmax over ALL experts (for the losses)


def route_top_k(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    balance_bias: Float[Tensor, " experts"] | None = None,
) -> TopK:
    r"""Choose k experts a token; their weights are a softmax over the chosen logits.

    .. math:: S = \operatorname{topk}(\sigma(\ell) + b),\qquad
       w_i = \frac{e^{\ell_i}}{\sum_{j \in S} e^{\ell_j}},\ i \in S

    The bias b steers the choice only; the weights, and so the gradient, never see it. It is added
    to sigmoid scores, which lie in (0, 1), so that a bias of 1 outweighs any logit.

    Example:
        >>> route_top_k(torch.tensor([[0.0, 2.0, 2.0]]), k=2).weights.tolist()
        [[0.5, 0.5]]

    Args:
        logits: Router output, float32 or wider.
        k: Experts a token, 1 <= k <= experts.
        balance_bias: Added to the sigmoid scores for the choice; None chooses by the logits.

    Raises:
        ConfigError: k is out of range.

    Source: order of top-k and softmax as in Mixtral; bias arXiv 2408.15664.
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ConfigError(
            "top_k must lie between 1 and num_experts",
            got=f"top_k={k}, num_experts={num_experts}",
            fix=f"Use top_k={num_experts} or fewer.",
        )
    score = logits.detach()
    if balance_bias is not None:
        score = score.sigmoid() + balance_bias
    experts = score.topk(k, dim=-1).indices  # (tokens, k)
    weights = logits.gather(-1, experts).softmax(dim=-1)  # (tokens, k)
    return TopK(experts, weights, logits.softmax(dim=-1))


def expert_load(
    experts: Int[Tensor, "*slots"],
    num_experts: int,
    counted: Bool[Tensor, "*slots"] | None = None,
) -> Int[Tensor, " experts"]:
    """How many (token, slot) pairs each expert received.

    Example:
        >>> expert_load(torch.tensor([[0, 2], [2, 1]]), 4).tolist()
        [1, 1, 2, 0]

    Args:
        experts: Chosen expert ids.
        num_experts: Experts (count).
        counted: Which pairs count; all when None. A token whose logits are NaN chooses nothing.
    """
    flat = experts.reshape(-1)
    load = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    ones = torch.ones_like(flat) if counted is None else counted.reshape(-1)
    return load.scatter_add_(0, flat, ones.to(torch.int64))


def switch_loss(
    probs: Float[Tensor, "tokens experts"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, ""]:
    r"""Load-balance loss; 1 when the routing is uniform, up to E at collapse.

    .. math:: L = E \sum_i f_i P_i ,\quad f_i = \frac{\text{slots of } i}{T k} ,\quad
       P_i = \frac{1}{T} \sum_t p_{t,i}

    The gradient flows through P only. Without tokens L = 0.

    Source: Switch Transformer (arXiv 2101.03961), eq. 4-6, generalised to k > 1.
    """
    num_experts = probs.shape[-1]
    share = expert_load(experts, num_experts).to(probs.dtype) / max(experts.numel(), 1)
    mean = probs.sum(dim=0) / max(probs.shape[0], 1)  # (experts,)
    return num_experts * (share * mean).sum()


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    r"""Keeps the logits small: mean over tokens of (log sum exp logits)^2.

    Without tokens it is 0.

    Source: ST-MoE (arXiv 2202.08906), eq. 5.
    """
    total: Tensor = logits.logsumexp(dim=-1).square().sum()
    return total / max(logits.shape[0], 1)


def balance_step(
    bias: Float[Tensor, "*layers experts"], load: Int[Tensor, "*layers experts"], rate: float
) -> Float[Tensor, "*layers experts"]:
    r"""One gradient-free step of the balance bias: b_i + u sign(mean load - load_i).

    Only the sign of the difference counts, so a load summed over micro-batches or ranks serves.

    Example:
        >>> balance_step(torch.zeros(2), torch.tensor([3, 1]), 0.5).tolist()
        [-0.5, 0.5]

    Source: Loss-free balancing, arXiv 2408.15664, algorithm 1.
    """
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean(dim=-1, keepdim=True) - load)


class ExpertGroups(NamedTuple):
    """The rows (token, slot) sorted by expert, so that rows of one expert are neighbours.

    Row r of the sorted order is slot ``order[r]`` of the flattened [tokens, k] choice.
    """

    order: Int[Tensor, " rows"]
    expert: Int[Tensor, " rows"]  # expert id of each sorted row, ascending
    counts: Int[Tensor, " experts"]
    back: Int[Tensor, " rows"] | None = None
    """The inverse of the order: slot s stands in row ``back[s]``. None: see `slot_rows`."""

    @property
    def num_experts(self) -> int:
        """Number of experts, those without a row included."""
        return self.counts.shape[0]


def group_by_expert(experts: Int[Tensor, "tokens k"], num_experts: int) -> ExpertGroups:
    """Sort the (token, slot) rows by expert, stably.

    Example:
        >>> group_by_expert(torch.tensor([[1, 0], [0, 1]]), 2).order.tolist()
        [1, 2, 0, 3]
    """
    flat = experts.reshape(-1)
    sorted_experts, order = flat.sort(stable=True)
    return ExpertGroups(order, sorted_experts, expert_load(experts, num_experts))


def slot_rows(groups: ExpertGroups) -> Int[Tensor, " rows"]:
    """The row of each slot: the inverse of the groups' order.

    Example:
        >>> slot_rows(group_by_expert(torch.tensor([[1, 0], [0, 1]]), 2)).tolist()
        [2, 0, 1, 3]
    """
    if groups.back is not None:
        return groups.back
    rows = torch.arange(groups.order.shape[0], device=groups.order.device)
    return torch.empty_like(groups.order).scatter_(0, groups.order, rows)


def dispatch(x: Float[Tensor, "tokens d"], groups: ExpertGroups, k: int) -> Float[Tensor, "rows d"]:
    """Copy each token to its k rows, in the groups' order."""
    return x.index_select(0, groups.order // k)


def combine(
    rows: Float[Tensor, "rows d"], weights: Float[Tensor, "tokens k"], groups: ExpertGroups
) -> Float[Tensor, "tokens d"]:
    """Bring the rows back to their tokens and add them up with the routing weights."""
    tokens, k = weights.shape
    slots = rows.index_select(0, slot_rows(groups)).reshape(
        tokens, k, rows.shape[1]
    )  # (tokens, k, d)
    return torch.einsum("tk,tkd->td", weights.to(rows.dtype), slots)
