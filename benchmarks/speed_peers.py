"""What `benchmarks/speed.py` compares: our layer, a dense network, and mixtures of experts.

Every peer has a plain definition to be checked against (`plain`) and says which bytes of weights a
decoding step must read (`read_bytes`). Packages that are not installed make a peer `Absent`.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bfmoe import functional, kernels
from lightning_bfmoe.functional import route_top_k
from lightning_bfmoe.layers import ButterflyMoE, PackedSubstrate

SCATTERMOE: list[Path] = []  # where a checkout of it lies, from the command line


class Absent(Exception):
    """A package that this peer needs is not installed."""


def package(name: str) -> object:
    """Import a package or say that it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name}: {error}") from error


class Butterfly(nn.Module):
    """Our layer as it trains late: all ternary, angles far from one another."""

    def __init__(
        self, d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype, scale: str = "absmean"
    ) -> None:
        super().__init__()
        with torch.device("cpu"):  # where the generator of its own draws
            self.layer = ButterflyMoE(
                d, d_ff, experts, k, bias=False, activation="gelu", angle_std=0.5, scale=scale
            )
        self.layer.set_blend(1.0)
        self.layer.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        return self.layer(x)

    def plain(self, x: Tensor) -> Tensor:
        """Stage by stage and pass by pass."""
        with contextlib.ExitStack() as stack:
            for op in ("rotate", "group", "dispatch", "combine", "quantize", "route", "logits"):
                stack.enter_context(kernels.use_kernel(op, "reference"))
            return self.layer(x)

    def deploy(self) -> None:
        """As it is deployed: trits at 2 bit, angles in float16."""
        for linear in self.layer.experts.linears().values():
            linear.substrate = PackedSubstrate.from_substrate(linear.substrate, "2")
            linear.rotate_in.freeze()
            linear.rotate_out.freeze()

    def read_bytes(self, touched: float) -> float:
        """The shared matrices at 2 bit, and the touched experts' angles in float16."""
        total = 0.0
        for linear in self.layer.experts.linears().values():
            angles = linear.rotate_in.angles[0].numel() + linear.rotate_out.angles[0].numel()
            total += linear.d_in * linear.d_out / 4 + 4 * linear.d_out + 2 * touched * angles
        return total


class Dense(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self, d: int, d_ff: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(d, d_ff, bias=False, dtype=dtype)
        self.down = nn.Linear(d_ff, d, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        return self.down(nn.functional.gelu(self.up(x)))

    plain = forward  # its own definition

    def read_bytes(self, touched: float) -> float:
        """Both matrices."""
        return 2 * self.up.weight.numel() * self.up.weight.itemsize


class StandardMoE(nn.Module):
    """Experts of their own, rows sorted by expert, one grouped product a matrix.

    On CUDA the choice, sorting, dispatch and combine are our fused kernels, so that it is as fast
    as we can make it.
    """

    def __init__(self, d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.k, self.experts = k, experts
        self.router = nn.Linear(d, experts, bias=False, dtype=dtype)
        self.up = nn.Parameter(torch.empty(experts, d, d_ff, dtype=dtype).normal_(std=d**-0.5))
        self.down = nn.Parameter(torch.empty(experts, d_ff, d, dtype=dtype).normal_(std=d_ff**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        if not x.is_cuda:
            return self.plain(x)
        choice, _ = kernels.route(self.router(x).float(), self.k, None)
        groups = kernels.group_by_expert(choice.experts, self.experts)
        ends = groups.counts.cumsum(0).int()
        rows = kernels.dispatch_rows(x, groups, self.k)
        hidden = nn.functional.gelu(grouped(rows, self.up, ends))
        return kernels.combine(grouped(hidden, self.down, ends), choice.weights, groups)

    def plain(self, x: Tensor) -> Tensor:
        """Expert by expert."""
        return plain_experts(x, self.router, self.k, self.up, self.down)

    def read_bytes(self, touched: float) -> float:
        """The touched experts' matrices."""
        return touched * 2 * self.up[0].numel() * self.up.itemsize


def plain_experts(x: Tensor, router: nn.Module, k: int, up: Tensor, down: Tensor) -> Tensor:
    """The definition of a mixture: matrices (experts, d, d_ff) and (experts, d_ff, d)."""
    choice = route_top_k(router(x).float(), k)
    groups = functional.group_by_expert(choice.experts, len(up))
    starts = [0, *groups.counts.cumsum(0).tolist()]

    def product(rows: Tensor, weights: Tensor) -> Tensor:
        parts = zip(starts, starts[1:], weights, strict=False)
        return torch.cat([rows[start:stop] @ weight for start, stop, weight in parts])

    hidden = nn.functional.gelu(product(functional.dispatch(x, groups, k), up))
    return functional.combine(product(hidden, down), choice.weights, groups).to(x.dtype)


def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The grouped product by torch's own kernel."""
    function = getattr(nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(rows, weights, offs=ends)


class ScatterMoE(nn.Module):
    """ScatterMoE's own layer (github.com/shawntan/scattermoe), with our router and sorting.

    Its own count of rows waits for the GPU and could not be captured in a graph.
    """

    def __init__(self, d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        for path in SCATTERMOE:
            if str(path) not in sys.path:
                sys.path.insert(0, str(path))
        package("scattermoe")
        module = importlib.import_module("scattermoe.mlp")
        module.flatten_sort_count = sorted_by_expert  # type: ignore[attr-defined]
        self.k = k
        self.router = nn.Linear(d, experts, bias=False, dtype=dtype)
        self.mlp = module.MLP(d, d_ff, experts, k, activation=nn.GELU()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        choice = route_top_k(self.router(x).float(), self.k)
        return self.mlp(x, choice.weights.to(x.dtype), choice.experts)

    def plain(self, x: Tensor) -> Tensor:
        """Expert by expert."""
        up, down = self.mlp.experts.weight, self.mlp.output_experts.weight  # (experts, out, in)
        return plain_experts(x, self.router, self.k, up.transpose(1, 2), down.transpose(1, 2))

    def read_bytes(self, touched: float) -> float:
        """The touched experts' matrices."""
        weight = self.mlp.experts.weight
        return touched * 2 * weight[0].numel() * weight.itemsize


def sorted_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ScatterMoE's `flatten_sort_count` gives."""
    groups = kernels.group_by_expert(experts, num_experts)
    return groups.expert, groups.order, groups.counts.cumsum(0)


Quantiser = Callable[[Tensor], tuple[Callable[[Tensor], Tensor], Tensor, float]]


class QuantisedExperts(nn.Module):
    """For decoding: experts in few bits, each by a package's own product, one after the other.

    Which experts the tokens take is worked out in the first call and kept, outside any graph: that
    spares these peers all routing. Only the touched experts are built; the others cost no time.
    """

    def __init__(
        self, d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype, quantise: Quantiser
    ) -> None:
        super().__init__()
        self.sizes, self.k, self.quantise = (d, d_ff), k, quantise
        self.router = nn.Linear(d, experts, bias=False, dtype=dtype)
        self.parts: list[tuple] | None = None
        self.bytes = 0.0

    def _build(self, x: Tensor) -> list[tuple]:
        """(tokens, weights, up, down) of each touched expert; products and their dense forms."""
        (d, d_ff), parts = self.sizes, []
        choice = route_top_k(self.router(x).float(), self.k)
        for expert in choice.experts.unique().tolist():
            token, slot = (choice.experts == expert).nonzero(as_tuple=True)
            pair = []
            for shape in ((d_ff, d), (d, d_ff)):
                weight = torch.randn(shape, device=x.device, dtype=x.dtype) * shape[1] ** -0.5
                run, dense, size = self.quantise(weight)
                pair.append((run, dense))
                self.bytes += size
            parts.append((token, choice.weights[token, slot, None].to(x.dtype), *pair))
        return parts

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        if self.parts is None:
            self.parts = self._build(x)
        y = torch.zeros_like(x)
        for token, weight, up, down in self.parts:
            rows = x if len(x) == 1 else x.index_select(0, token)
            if plain:
                out = nn.functional.gelu(rows @ up[1].t()) @ down[1].t()
            else:
                out = down[0](nn.functional.gelu(up[0](rows)))
            y.index_add_(0, token, out * weight)
        return y

    def plain(self, x: Tensor) -> Tensor:
        """With the dequantised matrices."""
        return self(x, plain=True)

    def deploy(self) -> None:
        """Forget the dequantised matrices."""
        assert self.parts is not None
        self.parts = [
            (token, weight, (up[0], None), (down[0], None))
            for token, weight, up, down in self.parts
        ]

    def read_bytes(self, touched: float) -> float:
        """What the packages hold."""
        return self.bytes


def gemlite(bits: int, weight: Tensor, group: int = 128) -> tuple:
    """GemLite's weight-only product (github.com/dropbox/gemlite), scales and zeros by 128."""
    helper = package("gemlite.helper")
    d_out, d_in = weight.shape
    blocks = weight.float().reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(weight.dtype)
    zero = (-low / scale.float()).to(weight.dtype)
    codes = (blocks / scale.float() + zero.float()).round().clamp(0, 2**bits - 1)
    dense = ((codes - zero.float()) * scale.float()).reshape(d_out, d_in).to(weight.dtype)
    processor = helper.A16Wn(device=str(weight.device), dtype=weight.dtype)  # type: ignore[attr-defined]
    linear = processor.from_weights(
        codes.to(torch.uint8).reshape(d_out, d_in), scale, zero, bits, group
    )
    return linear, dense, weight.numel() * (bits / 8 + 4 / group)


def nf4(weight: Tensor) -> tuple:
    """The 4-bit product of bitsandbytes, NF4, blocks of 64."""
    bnb = package("bitsandbytes")
    linear = bnb.nn.Linear4bit(  # type: ignore[attr-defined]
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4",
        device="cpu",
    )  # fmt: skip
    linear.weight = bnb.nn.Params4bit(  # type: ignore[attr-defined]
        weight.cpu(), requires_grad=False, quant_type="nf4"
    )
    linear = linear.to(weight.device)
    state = linear.weight.quant_state
    dense = bnb.functional.dequantize_4bit(linear.weight.data, state)  # type: ignore[attr-defined]
    return linear, dense.to(weight.dtype), weight.numel() * (0.5 + 4 / 64)


def quantised(quantise: Quantiser) -> Callable[..., nn.Module]:
    """A peer of `QuantisedExperts`."""
    return functools.partial(QuantisedExperts, quantise=quantise)
