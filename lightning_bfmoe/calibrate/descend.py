r"""Coordinate descent on the trits: what is left after one pass of GPTQ.

GPTQ decides a column once and never returns. With everything else fixed, the best trit of row o and
column j is known in closed form, so sweeping over the columns can only lower the error.
"""

import torch
from torch import Tensor

_BLOCK = 128


def descend_trits(
    weight: Tensor,
    trits: Tensor,
    alpha: Tensor,
    second_moment: Tensor,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    r"""Lower tr((W - alpha T) H' (W - alpha T)^T) over trits and scales, never raising it.

    With G = (W - alpha T) H' the best trit of one entry, all others fixed, is

    .. math:: t_{oj} \leftarrow \mathrm{clip}\big(\mathrm{round}\big(t_{oj} +
       G_{oj} / (\alpha_o H'_{jj})\big), -1, 1\big) ,

    and after each sweep alpha = (w H' t) / (t H' t). All rows move at once.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0]])
        >>> start = torch.tensor([[1, 0]], dtype=torch.int8), torch.tensor([[1.0]])
        >>> trits, alpha = descend_trits(weight, *start, torch.eye(2))
        >>> trits.tolist(), alpha.tolist()
        ([[1, 1]], [[1.0]])

    Args:
        weight: (d_out, d_in).
        trits: Start, int8.
        alpha: Scales, (d_out, 1) or (1, 1).
        second_moment: H of the inputs, (d_in, d_in).
        sweeps: Passes over all columns (count); ends early when none moves a trit.
        damping: Share of the mean diagonal added to H.

    Returns:
        Trits (int8) and scales (double).

    Source: coordinate descent after GPTQ as in QuIP (arXiv 2307.13304, its greedy updates); the
    ternary grid and the refitted scale ours.
    """
    w, t, alpha = weight.detach().double(), trits.double(), alpha.double()
    h = second_moment.detach().double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    if not bool((h.diagonal() > 0).all()):
        return trits, alpha  # no input ever moved: there is no error to lower
    for _ in range(sweeps):
        residual = (w - alpha * t) @ h  # (d_out, d_in)
        if not _sweep(t, alpha.expand(len(w), 1).squeeze(1), residual, h):
            break
        th = t @ h
        top, bottom = (th * w).sum(dim=1, keepdim=True), (th * t).sum(dim=1, keepdim=True)
        if len(alpha) != len(w):
            top, bottom = top.sum(dim=0, keepdim=True), bottom.sum(dim=0, keepdim=True)
        alpha = torch.where(bottom > 0, top / bottom.clamp(min=1e-300), alpha)
        t, alpha = torch.where(alpha < 0, -t, t), alpha.abs()
    return t.to(torch.int8), alpha


def _sweep(t: Tensor, alpha: Tensor, residual: Tensor, h: Tensor) -> bool:
    """One pass over the columns of `t`, in place; whether any trit moved."""
    moved = False
    safe = torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    for start in range(0, t.shape[1], _BLOCK):
        stop = min(start + _BLOCK, t.shape[1])
        block = residual[:, start:stop].T.contiguous()  # (columns, d_out)
        inner = h[start:stop, start:stop]
        steps = torch.zeros_like(block)
        for j in range(stop - start):
            old = t[:, start + j]
            new = (old + block[j] / (safe * inner[j, j])).round_().clamp_(-1, 1)
            new = torch.where(alpha > 0, new, old)
            steps[j] = (new - old) * alpha
            block.addr_(inner[:, j], steps[j], alpha=-1)
            t[:, start + j] = new
        if bool(steps.any()):
            moved = True
            residual.addmm_(steps.T, h[start:stop], alpha=-1)
    return moved
