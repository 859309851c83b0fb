"""The column equaliser: one positive number per input that makes the columns of a matrix alike."""

import torch
from torch import Tensor


def column_equalizer(weight: Tensor) -> Tensor:
    r"""Column norms over their geometric mean, c; W diag(1 / c) has columns of one norm.

    .. math:: c_j = \lVert W_{:, j} \rVert \Big/ \Big(\prod_k \lVert W_{:, k} \rVert\Big)^{1/n}

    W x = (W diag(1 / c)) (c * x) exactly, so c may stand in a layer's input gains. A column of
    zeros keeps c = 1.

    Example:
        >>> column_equalizer(torch.tensor([[4.0, 0.0, 1.0]])).tolist()
        [2.0, 1.0, 0.5]

    Args:
        weight: (d_out, d_in).

    Returns:
        c, (d_in,) in double.

    Source: ours; the data-free end of SmoothQuant (arXiv 2211.10438, eq. 4 at alpha = 0).
    """
    norms = weight.detach().double().norm(dim=0)  # (d_in,)
    alive = norms > 0
    if not bool(alive.any()):
        return torch.ones_like(norms)
    mean = norms[alive].log().mean().exp()
    return torch.where(alive, norms / mean, torch.ones_like(norms))
