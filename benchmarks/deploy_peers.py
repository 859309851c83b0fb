"""The standard mixtures of `benchmarks/deploy.py`: experts in full, quantised, and ternary."""

import torch
from torch import Tensor, nn

from benchmarks.speed_peers import StandardMoE, grouped
from lightning_bfmoe import kernels
from lightning_bfmoe.functional.packing import packed_size, unpack_trits
from lightning_bfmoe.functional.ternary import dequantize_ternary
from lightning_bfmoe.kernels import ternary_linear

FEW_ROWS = 32
"""Up to so many rows a GPU gathers the float32 matrices of their experts."""


def visited(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The grouped product, by the experts that have rows."""
    starts = [0, *ends.tolist()]
    parts = zip(starts, starts[1:], weights, strict=False)
    return torch.cat([rows[start:stop] @ weight for start, stop, weight in parts if stop > start])


def gathered(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The grouped product of a few rows, each with its expert's matrix; nothing waits."""
    experts = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
    return torch.bmm(rows.unsqueeze(1), weights[experts]).squeeze(1)


class StandardRows(nn.Module):
    """`speed_peers.StandardMoE` in a model of (batch, time, width), by its fastest product."""

    def __init__(self, d: int, d_ff: int, experts: int, k: int) -> None:
        super().__init__()
        self.layer = StandardMoE(d, d_ff, experts, k, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> same."""
        layer, rows = self.layer, x.reshape(-1, x.shape[-1])
        choice, _ = kernels.route(layer.router(rows).float(), layer.k, None)
        groups, product = (
            kernels.group_by_expert(choice.experts, layer.experts),
            self._product(rows),
        )
        ends = groups.counts.cumsum(0).int()
        hidden = product(kernels.dispatch_rows(rows, groups, layer.k), layer.up, ends)
        y = product(nn.functional.gelu(hidden), layer.down, ends)
        return kernels.combine(y, choice.weights, groups).to(x.dtype).reshape(x.shape)

    def _product(self, rows: Tensor):
        if rows.device.type == "cuda" and rows.dtype != torch.float32:
            return grouped  # torch's kernel, of 16-bit numbers
        few = len(rows) * self.layer.k <= FEW_ROWS
        return gathered if rows.device.type == "cuda" and few else visited


class ListedMoE(nn.Module):
    """Experts as modules of their own, for quantisers that replace `nn.Linear`."""

    def __init__(self, d: int, d_ff: int, experts: int, k: int) -> None:
        super().__init__()
        self.k, self.router = k, nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(self.expert(d, d_ff) for _ in range(experts))

    def expert(self, d: int, d_ff: int) -> nn.Module:
        """One of them, rows (rows, d) to (rows, d)."""
        up, down = nn.Linear(d, d_ff, bias=False), nn.Linear(d_ff, d, bias=False)
        return nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> same."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).topk(self.k, dim=-1)
        weights, y = weights.softmax(-1), torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            y[tokens] += weights[tokens, slots].unsqueeze(1) * self.experts[expert](rows[tokens])
        return y.reshape(x.shape)


class TernaryLinear(nn.Module):
    """A ternary matrix of its own at 1.6 bit, with row scales; random, as no time depends on it."""

    packed: Tensor
    alpha: Tensor

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        packed = torch.empty(packed_size(d_in * d_out), dtype=torch.uint8).random_(3**5)
        packed[-1] = 3**5 // 2  # zeros, as what lies behind the last trit must be
        self.register_buffer("packed", packed)
        self.register_buffer("alpha", torch.full((d_out, 1), (1.5 / d_in) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Rows (rows, d_in) to (rows, d_out); on the CPU few rows are looked up from the trits."""
        return ternary_linear(x, self.packed, self.alpha, self.d_out, "1.6", self.dense)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix; nothing keeps it."""
        trits = unpack_trits(self.packed, (self.d_out, self.d_in))
        return dequantize_ternary(trits, self.alpha, dtype)


class TernaryMoE(ListedMoE):
    """A standard MoE whose every expert is ternary: the control of equal precision."""

    def expert(self, d: int, d_ff: int) -> nn.Module:
        """Two ternary matrices."""
        return nn.Sequential(TernaryLinear(d, d_ff), nn.GELU(), TernaryLinear(d_ff, d))


def widened(layer: TernaryMoE, dtype: torch.dtype) -> StandardRows:
    """Its matrices in `dtype`: what runs where no kernel multiplies with packed trits."""
    pairs = [(expert[0], expert[2]) for expert in layer.experts]
    up, down = pairs[0]
    with torch.device("meta"):
        wide = StandardRows(up.d_in, up.d_out, len(pairs), layer.k)
    inner, device = wide.layer, up.packed.device
    inner.up, inner.down = (
        nn.Parameter(
            torch.empty(len(pairs), one.d_in, one.d_out, dtype=dtype, device=device),
            requires_grad=False,
        )
        for one in (up, down)
    )
    for number, pair in enumerate(pairs):
        for stack, one in zip((inner.up, inner.down), pair, strict=True):
            stack.data[number] = one.dense(dtype).T
    inner.router.weight = nn.Parameter(layer.router.weight.data.to(dtype), requires_grad=False)
    return wide
