"""Time of one feed-forward layer, side by side: a training step and decoding.

    python benchmarks/speed.py --out benchmarks/results/speed.json --limit 500
    python benchmarks/speed.py --only what=train d=2048 --peers butterfly,standard
    python benchmarks/speed.py --device cpu --size small --out outputs/speed.json
    python benchmarks/speed.py --plot docs/images/speed.png

A training step is forward, backward and AdamW of the layer alone, on random tokens. All competitors
have the same width, the same hidden width and the same top-k; the dense network is k times as wide,
so that all have the same active FLOPs. First each must equal its own plain definition; then each
is timed. On a GPU weights and tokens are bf16 (ButterflyMoE keeps its parameters in float32) and
times are medians between events; the peak counts parameters, gradients and optimizer state too.
Decoding is the replay of a CUDA graph there, with a cold cache, as between the layers of a model.

Beside each time stands its limit: in training the matrices' FLOPs at the rate of a large product,
in decoding the bytes of weights at the rate of a large copy, both measured here. A layer that does
not fit is a record with `failed`; a peer whose package is missing one with `absent`, tried again in
the next run. ScatterMoE is a checkout named by `--scattermoe`; gemlite and bitsandbytes installed.

The file is written after every measurement and what it already holds is not measured again, so a
run that `--limit` (seconds) cut off goes on where it stopped. To add a peer, see `speed_peers.py`.
"""

import argparse
import functools
import json
import os
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

from benchmarks import speed_peers as peers
from benchmarks.speed_plot import draw, table

SIZES = {
    "full": {"d": [2048, 1024, 512, 4096], "experts": [8, 64, 256], "k": [2, 4], "tokens": 16384},
    "small": {"d": [64], "experts": [8], "k": [2], "tokens": 256},
}
DECODE = [1, 2, 4, 8]
REPEATS = {"cuda": (5, 20), "cpu": (2, 7)}  # warm-up, timed
# (d, d_ff, experts, top-k, dtype) -> layer, ours first.
PEERS: dict[str, Callable[[int, int, int, int, torch.dtype], nn.Module]] = {
    "butterfly": peers.Butterfly,
    "dense": lambda d, d_ff, experts, k, dtype: peers.Dense(d, k * d_ff, dtype),
    "standard": peers.StandardMoE,
    "butterfly_lstsq": functools.partial(peers.Butterfly, scale="lstsq"),
    "scattermoe": peers.ScatterMoE,
    "gemlite4": peers.quantised(functools.partial(peers.gemlite, 4)),
    "gemlite2": peers.quantised(functools.partial(peers.gemlite, 2)),
    "nf4": peers.quantised(peers.nf4),
}
ONLY = {  # what a peer cannot do, or does no differently
    "butterfly_lstsq": "train", "gemlite4": "decode", "gemlite2": "decode", "nf4": "decode",
}  # fmt: skip
DEFAULT = {"cuda": tuple(PEERS), "cpu": ("butterfly", "dense", "standard")}
HALF = ("gemlite4", "gemlite2")  # float16, which their kernels prefer to bf16


def jobs(size: str, names: tuple[str, ...] = DEFAULT["cpu"]) -> list[dict]:
    """What is to be measured, most wanted first."""
    found, sizes = [], SIZES[size]
    for d in sizes["d"]:
        for k in sizes["k"]:
            for experts in sizes["experts"]:
                case = {"d": d, "d_ff": 4 * d, "experts": experts, "k": k}
                what = [{**case, "what": "train", "tokens": sizes["tokens"]}]
                if k == sizes["k"][0]:
                    what += [{**case, "what": "decode", "tokens": n} for n in DECODE]
                for one in what:
                    able = [name for name in names if ONLY.get(name, one["what"]) == one["what"]]
                    found += [{**one, "peer": name} for name in able]
    return found


def build(job: dict, device: str) -> tuple[nn.Module, Tensor]:
    """The layer and its tokens."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dtype = torch.float16 if job["peer"] in HALF else dtype
    with torch.device(device):
        layer = PEERS[job["peer"]](job["d"], job["d_ff"], job["experts"], job["k"], dtype)
        x = torch.randn(job["tokens"], job["d"], dtype=dtype)
    return layer.to(device), x


def check(layer: nn.Module, x: Tensor) -> float:
    """Relative distance from the layer's plain definition; at most a few roundings of its dtype."""
    with torch.no_grad():
        y, plain = layer(x), layer.plain(x)
    error = float((y.float() - plain.float()).norm() / plain.float().norm())
    assert error < (1e-4 if x.dtype == torch.float32 else 3e-2), f"wrong by {error}"
    return error


def seconds(function: Callable[[], object], device: str, cold: bool = False) -> float:
    """Median time of a call; `cold` empties the GPU's cache before each."""
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
    other = torch.empty(2**28 if cold else 0, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        other.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1000


def measure(job: dict, device: str, rates: dict | None = None) -> dict:
    """One record: check, then time."""
    if device == "cuda":
        torch.cuda.empty_cache()
    layer, x = build(job, device)
    error = check(layer, x[:64])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trained, graphed = job["what"] == "train", None
    if trained:
        step = trainer(layer, x)
    else:
        step, graphed = decoder(layer, x)
    time_of = seconds(step, device, cold=not trained)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    passes = 3 if trained else 1
    flops = passes * 4 * job["tokens"] * job["k"] * job["d"] * job["d_ff"]  # of the matrices alone
    limit = {}
    if rates:
        bound = flops / rates["flops"] if trained else weight_bytes(layer, job) / rates["bytes"]
        limit = {"limit_seconds": bound}
    return {
        **job, "error": error, "seconds": time_of, "tokens_per_second": job["tokens"] / time_of,
        "tflops": flops / time_of / 1e12, "peak_bytes": peak, **limit,
        "parameters": sum(p.numel() for p in layer.parameters()),
        **({} if trained else {"graphed": graphed}),
    }  # fmt: skip


def weight_bytes(layer: nn.Module, job: dict) -> float:
    """Bytes of weights that a decoding step reads, with the expected number of touched experts."""
    experts = job["experts"]
    touched = experts * (1 - (1 - job["k"] / experts) ** job["tokens"])
    return layer.read_bytes(touched)


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


def decoder(layer: nn.Module, x: Tensor) -> tuple[Callable[[], object], bool]:
    """A forward pass without gradients, and whether it is replayed as a CUDA graph."""
    layer.eval()
    if hasattr(layer, "deploy"):
        with torch.no_grad():
            before = layer(x)
            layer.deploy()
            apart = (layer(x) - before).norm() / before.norm()
        assert apart < 3e-2, f"another layer once deployed: {float(apart)}"

    def step() -> None:
        with torch.no_grad():
            layer(x)

    if x.device.type != "cuda":
        return step, False
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except Exception as error:  # a peer that waits for the GPU
        print(f"not graphed: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.synchronize()
        return step, False
    return graph.replay, True


def limits(device: str) -> dict:
    """FLOPs and bytes per second of a large product and a large copy."""
    n, size = (8192, 2**29) if device == "cuda" else (1024, 2**26)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    flops = 2 * n**3 / seconds(lambda: a @ b, device)
    x = torch.zeros(size, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    return {"flops": flops, "bytes": 2 * size / seconds(lambda: y.copy_(x), device)}


def key(record: dict) -> tuple:
    """What identifies a measurement."""
    return tuple(record[name] for name in ("what", "peer", "d", "d_ff", "experts", "k", "tokens"))


def facts(device: str) -> dict:
    """The machine and the versions; the commit from COMMIT where there is no repository."""
    commit = os.environ.get("COMMIT") or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device, "name": name, "torch": torch.__version__, "threads":
        torch.get_num_threads(), "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def run(
    size: str,
    device: str,
    out: Path,
    limit: float,
    wanted: Callable[[dict], bool] = lambda job: True,
    names: tuple[str, ...] | None = None,
    again: str = "absent",
) -> dict[str, Any]:
    """Measure what is missing in the file until the limit; the file's content."""
    start = time.monotonic()
    content = json.loads(out.read_text()) if out.exists() else {"records": []}
    here = facts(device)
    before = content.setdefault("facts", here)
    if {**before, "commit": ""} != {**here, "commit": ""}:
        raise SystemExit(f"{out} was measured elsewhere: {before}; name another --out")
    rates = content.get("limits") or content.setdefault("limits", limits(device))
    content["records"] = [r for r in content["records"] if not {"absent", again} & set(r)]
    done = {key(record) for record in content["records"]}
    for job in filter(wanted, jobs(size, names or DEFAULT[device])):
        if time.monotonic() - start > limit:
            break
        if key(job) in done:
            continue
        try:
            record = measure(job, device, rates)
        except peers.Absent as error:
            record = {**job, "absent": str(error)[:300]}
        except Exception as error:  # too large, or not supported there: a result too
            record = {**job, "failed": f"{type(error).__name__}: {error}"[:300]}
            print(record, flush=True)
        record["commit"] = here["commit"]
        content["records"].append(record)
        temporary = out.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(out)
    return content


def fits(filters: list[str], job: dict) -> bool:
    """Whether a job matches every `name=value,value` of `--only`."""
    pairs = [one.split("=", 1) for one in filters]
    return all(str(job[name]) in values.split(",") for name, values in pairs)


def main() -> None:
    """Measure, write, print; or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which none starts")
    parser.add_argument("--only", nargs="*", default=[], help="such as what=train d=2048,1024")
    parser.add_argument("--peers", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--scattermoe", type=Path, help="a checkout of ScatterMoE")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--plot", type=Path, help="draw what --out holds, measure nothing")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.out.read_text()), options.plot)
        return
    peers.SCATTERMOE[:] = [options.scattermoe] if options.scattermoe else []
    names = tuple(options.peers.split(",")) if options.peers else None
    wanted = functools.partial(fits, options.only)
    again = "failed" if options.retry else "absent"
    content = run(options.size, options.device, options.out, options.limit, wanted, names, again)
    print(table(content["records"]))
    print(f"{len(content['records'])} records in {options.out}")


if __name__ == "__main__":
    main()
