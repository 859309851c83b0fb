"""Time of one feed-forward layer, side by side: a training step and decoding.

    python benchmarks/speed.py --out benchmarks/results/speed.json --limit 500
    python benchmarks/speed.py --device cpu --size small --out outputs/speed.json

A training step is forward, backward and AdamW of the layer alone, on random tokens. All competitors
have the same width, the same hidden width and the same top-k; the dense network is k times as wide,
so that all have the same active FLOPs. First each must equal its own plain definition; then each
is timed. On a GPU weights and tokens are bf16 (ButterflyMoE keeps its parameters in float32) and
times are medians between events; the peak counts parameters, gradients and optimizer state too.
Decoding is the replay of a CUDA graph there. A layer that does not fit is a record with `failed`.

The file is written after every measurement and what it already holds is not measured again, so a
run that `--limit` (seconds) cut off goes on where it stopped. To add a peer, add to `PEERS` a
function that builds its layer.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from lightning_bfmoe.functional import group_by_expert, route_top_k
from lightning_bfmoe.functional.routing import combine, dispatch
from lightning_bfmoe.kernels import use_kernel
from lightning_bfmoe.layers import ButterflyMoE, PackedSubstrate

SIZES = {
    "full": {"d": [2048, 1024, 512, 4096], "experts": [8, 64, 256], "k": [2, 4], "tokens": 16384},
    "small": {"d": [64], "experts": [8], "k": [2], "tokens": 256},
}
DECODE = [1, 2, 4, 8]
REPEATS = {"cuda": (5, 20), "cpu": (2, 7)}  # warm-up, timed


class Dense(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self, d: int, d_ff: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(d, d_ff, bias=False, dtype=dtype)
        self.down = nn.Linear(d_ff, d, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        return self.down(nn.functional.gelu(self.up(x)))


class StandardMoE(nn.Module):
    """Experts of their own, rows sorted by expert, one grouped product a matrix."""

    def __init__(self, d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.k, self.experts = k, experts
        self.router = nn.Linear(d, experts, bias=False, dtype=dtype)
        self.up = nn.Parameter(torch.empty(experts, d, d_ff, dtype=dtype).normal_(std=d**-0.5))
        self.down = nn.Parameter(torch.empty(experts, d_ff, d, dtype=dtype).normal_(std=d_ff**-0.5))

    def forward(self, x: Tensor, product: Callable | None = None) -> Tensor:
        """(tokens, d) to (tokens, d)."""
        product = product or grouped
        choice = route_top_k(self.router(x).float(), self.k)
        groups = group_by_expert(choice.experts, self.experts)
        ends = groups.counts.cumsum(0).int()
        rows = dispatch(x, groups, self.k)
        hidden = nn.functional.gelu(product(rows, self.up, ends))
        return combine(product(hidden, self.down, ends), choice.weights, groups).to(x.dtype)


def loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The grouped product, expert by expert; the definition."""
    starts = [0, *ends.tolist()]
    parts = zip(starts, starts[1:], weights, strict=False)
    return torch.cat([rows[start:stop] @ weight for start, stop, weight in parts])


def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The grouped product by torch's own kernel, which CPUs and float32 do not have everywhere."""
    if rows.device.type == "cpu":
        return loop(rows, weights, ends)
    function = getattr(nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(rows, weights, offs=ends)


def butterfly(d: int, d_ff: int, experts: int, k: int, dtype: torch.dtype) -> nn.Module:
    """Our layer as it trains late: all ternary, angles far from one another."""
    with torch.device("cpu"):  # where the generator of its own draws
        layer = ButterflyMoE(d, d_ff, experts, k, bias=False, activation="gelu", angle_std=0.5)
    layer.set_blend(1.0)
    return layer.to(dtype)


# (d, d_ff, experts, top-k, dtype) -> layer, ours first. Third-party layers belong here.
PEERS: dict[str, Callable[[int, int, int, int, torch.dtype], nn.Module]] = {
    "butterfly": butterfly,
    "dense": lambda d, d_ff, experts, k, dtype: Dense(d, k * d_ff, dtype),
    "standard": StandardMoE,
}


def jobs(size: str) -> list[dict]:
    """What is to be measured, most wanted first."""
    found, sizes = [], SIZES[size]
    for d in sizes["d"]:
        for k in sizes["k"]:
            for experts in sizes["experts"]:
                case = {"d": d, "d_ff": 4 * d, "experts": experts, "k": k}
                train = {**case, "what": "train", "tokens": sizes["tokens"]}
                found += [{**train, "peer": peer} for peer in PEERS]
                if k == sizes["k"][0]:
                    decode = [{**case, "what": "decode", "tokens": n} for n in DECODE]
                    found += [{**one, "peer": peer} for one in decode for peer in PEERS]
    return found


def build(job: dict, device: str) -> tuple[nn.Module, Tensor]:
    """The layer and its tokens."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        layer = PEERS[job["peer"]](job["d"], job["d_ff"], job["experts"], job["k"], dtype)
        x = torch.randn(job["tokens"], job["d"], dtype=dtype)
    return layer.to(device), x


def check(layer: nn.Module, x: Tensor) -> float:
    """Relative distance from the layer's plain definition; at most a few roundings of its dtype."""
    with torch.no_grad():
        y = layer(x)
        if isinstance(layer, StandardMoE):
            plain = layer(x, loop)
        else:  # ours against its reference rotation; the others are their own definition
            with use_kernel("rotate", "reference"):
                plain = layer(x)
    error = float((y - plain).norm() / plain.norm())
    assert error < (3e-2 if x.dtype == torch.bfloat16 else 1e-4), f"wrong by {error}"
    return error


def seconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call."""
    warm, repeats = REPEATS[device]
    for _ in range(warm):
        function()
    if device == "cpu":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
        return statistics.median(found)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1000


def measure(job: dict, device: str) -> dict:
    """One record: check, then time."""
    if device == "cuda":
        torch.cuda.empty_cache()
    layer, x = build(job, device)
    error = check(layer, x[:64])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if job["what"] == "train":
        step = trainer(layer, x)
    else:
        layer.eval()
        step = decoder(layer, x)
    time_of = seconds(step, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    passes = 3 if job["what"] == "train" else 1
    flops = passes * 4 * job["tokens"] * job["k"] * job["d"] * job["d_ff"]  # of the matrices alone
    return {
        **job, "error": error, "seconds": time_of, "tokens_per_second": job["tokens"] / time_of,
        "tflops": flops / time_of / 1e12, "peak_bytes": peak,
        "parameters": sum(p.numel() for p in layer.parameters()),
    }  # fmt: skip


def trainer(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A training step: forward, backward, AdamW."""
    on_gpu = x.device.type == "cuda"
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=on_gpu)
    x, up = x.requires_grad_(), torch.randn_like(x)

    def step() -> None:
        layer(x).backward(up)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def decoder(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward pass without gradients, replayed as a CUDA graph where there is one."""
    if isinstance(layer, ButterflyMoE):  # as it is deployed: packed, the matrix unpacked once
        for linear in layer.experts.linears().values():
            linear.substrate = PackedSubstrate.from_substrate(linear.substrate, "2")

    def step() -> None:
        with torch.no_grad():
            layer(x)

    if x.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def key(record: dict) -> tuple:
    """What identifies a measurement."""
    return tuple(record[name] for name in ("what", "peer", "d", "d_ff", "experts", "k", "tokens"))


def facts(device: str) -> dict:
    """The machine and the versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
        text=True,
    )  # fmt: skip
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device, "name": name, "torch": torch.__version__, "threads":
        torch.get_num_threads(), "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }  # fmt: skip


def table(records: list[dict]) -> str:
    """A line a case: time of our step, and its ratio to every peer's."""
    cases: dict[tuple, dict[str, dict]] = {}
    for record in records:
        if "seconds" in record:
            what, peer, *case = key(record)
            cases.setdefault((what, *case), {})[peer] = record
    lines = []
    for (what, d, _, experts, k, tokens), found in cases.items():
        ours = found.get("butterfly")
        if ours is None:
            continue
        line = f"{what:6} d={d:4} N={experts:3} k={k} tokens={tokens:5}"
        line += f" {1e3 * ours['seconds']:9.3f} ms"
        for peer, other in found.items():
            if peer != "butterfly":
                line += f"  {ours['seconds'] / other['seconds']:.2f}x {peer}"
        lines.append(line)
    return "\n".join(lines)


def run(size: str, device: str, out: Path, limit: float) -> dict[str, Any]:
    """Measure what is missing in the file until the limit; the file's content."""
    start = time.monotonic()
    content = json.loads(out.read_text()) if out.exists() else {"records": []}
    here = facts(device)
    before = content.setdefault("facts", here)
    if {**before, "commit": ""} != {**here, "commit": ""}:
        raise SystemExit(f"{out} was measured elsewhere: {before}; name another --out")
    done = {key(record) for record in content["records"]}
    for job in jobs(size):
        if time.monotonic() - start > limit:
            break
        if key(job) in done:
            continue
        try:
            record = measure(job, device)
        except Exception as error:  # too large, or not supported there: a result too
            record = {**job, "failed": f"{type(error).__name__}: {error}"[:300]}
            print(record, flush=True)
        record["commit"] = here["commit"]
        content["records"].append(record)
        temporary = out.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(out)
    return content


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which none starts")
    options = parser.parse_args()
    content = run(options.size, options.device, options.out, options.limit)
    print(table(content["records"]))
    print(f"{len(content['records'])} of {len(jobs(options.size))} measured")


if __name__ == "__main__":
    main()
