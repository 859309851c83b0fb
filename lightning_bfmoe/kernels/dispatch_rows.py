"""The ops "sort slots by expert" and "copy tokens to their rows": the definitions, or fused."""

from torch import Tensor

from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.functional.routing import dispatch as dispatch_reference
from lightning_bfmoe.functional.routing import group_by_expert as group_reference
from lightning_bfmoe.kernels.cuda import missing_triton
from lightning_bfmoe.kernels.dispatch import Kernel, choose, register
from lightning_bfmoe.kernels.groups_cuda import group_cuda, suits_group
from lightning_bfmoe.kernels.rows_cuda import dispatch_cuda, suits_dispatch


def group_by_expert(experts: Tensor, num_experts: int) -> ExpertGroups:
    """`functional.group_by_expert`, by the fastest kernel; all give the same groups.

    Example:
        >>> import torch
        >>> group_by_expert(torch.tensor([[1, 0], [0, 1]]), 2).order.tolist()
        [1, 2, 0, 3]

    Args:
        experts: Chosen expert ids, (tokens, k) int64.
        num_experts: Experts (count).
    """
    return choose("group", experts, num_experts).run(experts, num_experts)


def dispatch_rows(x: Tensor, groups: ExpertGroups, k: int) -> Tensor:
    """`functional.dispatch`, by the fastest kernel: each token to its k rows, sorted by expert.

    Args:
        x: Tokens, (tokens, d).
        groups: The order of the rows.
        k: Experts a token.

    Returns:
        (tokens * k, d) in the dtype of `x`.
    """
    return choose("dispatch", x, groups, k).run(x, groups, k)


register(
    Kernel(
        "group",
        "reference",
        group_reference,
        lambda *_: True,
        "a stable sort and a count; any device",
    )
)
register(
    Kernel(
        "group",
        "triton",
        group_cuda,
        suits_group,
        "counting sort in one or two launches, which inverts the order too; CUDA with triton",
        missing=missing_triton,
    )
)
register(
    Kernel(
        "dispatch",
        "reference",
        dispatch_reference,
        lambda *_: True,
        "a gather; any device and dtype",
    )
)
register(
    Kernel(
        "dispatch",
        "triton",
        dispatch_cuda,
        suits_dispatch,
        "one launch, gradient without atomics; CUDA with triton, not double",
        missing=missing_triton,
    )
)
