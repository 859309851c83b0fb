"""`LowRankCorrection`: a small dense branch beside a layer's experts, for what they all miss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers.precision import KeepsFloat32

if TYPE_CHECKING:
    from lightning_bfmoe.layers.moe import ButterflyMoE


class LowRankCorrection(KeepsFloat32):
    r"""y = V (U x + c), added once to a layer's output, whichever experts a token visits.

    .. math:: y = V\,(U x + c) ,\qquad U \in R^{r \times d_{in}},\ V \in R^{d_{out} \times r}

    With :math:`c = -U \bar x` it moves no mean, so leading components alone are a correction too.
    As built V is 0 and U small and random: it adds nothing, and both learn from the first steps on.

    Example:
        >>> LowRankCorrection(16, 8, rank=2)(torch.randn(3, 5, 16)).abs().sum().item()
        0.0

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        rank: r, from 1 to min(d_in, d_out).
        generator: Draws U.
        device: Where parameters live.

    Raises:
        ConfigError: The rank is out of range.

    Source: SVDQuant (arXiv 2411.05007) keeps a 16-bit low-rank branch beside a quantised matrix;
    beside a whole feed-forward layer, and fitted to its error: ours.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or not 1 <= rank <= min(d_in, d_out):
            raise ConfigError(
                f"the rank of a correction {d_in} -> {d_out} lies in 1 to {min(d_in, d_out)}",
                got=f"correction_rank={rank!r}",
                fix=f"About d / 16 serves: correction_rank={max(1, min(d_in, d_out) // 16)}.",
            )
        self.d_in, self.d_out, self.rank = d_in, d_out, rank
        self.basis = nn.Parameter(torch.empty(rank, d_in, device=device))  # U
        self.offset = nn.Parameter(torch.zeros(rank, device=device))  # c
        self.weight = nn.Parameter(torch.zeros(d_out, rank, device=device))  # V
        with torch.no_grad():
            drawn = torch.randn(rank, d_in, generator=generator, dtype=torch.float32)
            self.basis.copy_(drawn * d_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d_in) to (..., d_out), in the dtype of `x`."""
        hidden = F.linear(x, self.basis.to(x.dtype), self.offset.to(x.dtype))  # (..., r)
        return F.linear(hidden, self.weight.to(hidden.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{self.d_in} -> {self.d_out}, rank={self.rank}"

    @torch.no_grad()
    def leading(self, rank: int) -> LowRankCorrection:
        """A correction of the first `rank` components, with its own parameters."""
        part = LowRankCorrection(self.d_in, self.d_out, rank, device=self.basis.device)
        part.to(self.basis.dtype)
        part.basis.copy_(self.basis[:rank])
        part.offset.copy_(self.offset[:rank])
        part.weight.copy_(self.weight[:, :rank])
        return part.train(self.training)


def set_correction_(layer: ButterflyMoE, correction: LowRankCorrection | None) -> ButterflyMoE:
    """Give a layer this correction, or none; its settings follow, so that a checkpoint rebuilds it.

    Example:
        >>> from lightning_bfmoe.layers import ButterflyMoE
        >>> layer = ButterflyMoE(8, 16, num_experts=2, correction_rank=4)
        >>> layer = set_correction_(layer, layer.correction.leading(1))
        >>> layer.settings["correction_rank"], set_correction_(layer, None).correction is None
        (1, True)

    Args:
        layer: Changed in place; build optimizers afterwards.
        correction: Of the layer's widths.

    Returns:
        The layer.
    """
    layer.correction = correction
    rank = 0 if correction is None else correction.rank
    layer.settings = {**layer.settings, "correction_rank": rank}
    return layer


def correction_bytes(d_in: int, d_out: int, rank: int, bits: int = 16) -> int:
    """Packed bytes of a correction: factors of so many bits, an fp32 offset.

    Example:
        >>> correction_bytes(512, 512, 8)
        16416
    """
    return rank * (d_in + d_out) * bits // 8 + 4 * rank
