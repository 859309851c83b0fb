"""Causal attention with a cache, and how to find it in a traced model."""

from typing import Any

import torch
from torch import Tensor, fx

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_SAME_VALUES = {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
}
_RESHAPES = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
}


def attend(q: Tensor, k: Tensor, v: Tensor, past: Any, scale: float | None) -> Tensor:
    """Causal attention of the last queries; key and value heads may be fewer (grouped queries).

    Args:
        q: (batch, heads, time, width).
        k: Of past and present, (batch, kv_heads, past + time, width).
        v: Likewise.
        past: How many of the keys came before the first query, an integer or a symbolic one.
        scale: Of the scores; None: width ** -0.5.

    Returns:
        (batch, heads, time, width of v).
    """
    batch, heads, time, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    scale = width**-0.5 if scale is None else scale
    flat = (q * scale).reshape(batch, groups, -1, width)  # (batch, groups, heads a group * time, d)
    scores = flat @ k.transpose(2, 3)
    scores = scores.reshape(batch, groups, heads // groups, time, keys)
    column = torch.arange(keys, device=q.device)
    row = torch.arange(time, device=q.device).unsqueeze(1) + past
    scores = scores.masked_fill(column > row, float("-inf")).softmax(dim=-1)
    mixed = scores.reshape(batch, groups, -1, keys) @ v
    return mixed.reshape(batch, heads, time, v.shape[-1])


def before_repetition(node: fx.Node, axis: int = 1) -> fx.Node:
    """The key or value heads before they were repeated for grouped queries, or the node itself.

    Recognised is ``x[:, :, None].expand(b, g, n, t, d).reshape(b, g * n, t, d)``.
    """
    if node.target not in _RESHAPES or node.meta["val"].dim() != 4:
        return node
    expanded = _through(node.args[0])
    if expanded.target is not torch.ops.aten.expand.default or expanded.meta["val"].dim() != 5:
        return node
    single = _through(expanded.args[0])
    if single.target is not torch.ops.aten.unsqueeze.default or single.args[1] != axis + 1:
        return node
    base = _through(single.args[0])
    heads, groups = node.meta["val"].shape[axis], base.meta["val"].shape[axis]
    repeated = expanded.meta["val"].shape
    whole = repeated[axis] == groups and repeated[axis] * repeated[axis + 1] == heads
    return base if whole else node


def is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask (..., time, time) lets each query see itself and what came before, no more.

    Example:
        >>> is_causal_mask(torch.ones(2, 1, 5, 5).tril().bool())
        True
        >>> is_causal_mask(torch.ones(5, 5).bool())
        False
    """
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    if mask.dtype != torch.bool and bool((mask[seen] != 0).any()):
        return False
    if mask.shape[-1] != mask.shape[-2]:
        return False
    wanted = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    return bool((seen == wanted).all())


def _through(node: Any) -> fx.Node:
    """Past operations that change no value here: whole slices, copies."""
    while node.target in _SAME_VALUES:
        if node.target is torch.ops.aten.slice.Tensor:
            start, end = (*node.args, None, None)[2:4]
            if start not in (0, None) or not (
                end is None or (isinstance(end, int) and end > 2**60)
            ):
                break
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
