"""The CPU kernels beside what a user would run instead; correctness first.

    python benchmarks/cpu.py [--threads 2] [--out FILE] [--seconds 0.6]

Four parts: one matrix (packed ternary product against torch and onnxruntime), a whole layer for
one token, the rotation against a copy of the rows, and the quickstart's training step. The variants
of a case take turns, call by call, and each figure is the median of its calls; the best call is in
the file too. "cold": caches are emptied before each call, as when the layers of a real model follow
one another; else the same matrix again and again. Beside the time stands the limit of the memory:
the bytes that a variant has to read over the measured rate. One thread is timed by its own CPU
time, more by the wall clock, which other load spoils: how much there was is part of the record.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.cpu_peers import StandardMoE, products, random_ternary
from examples.gpt import GPT
from lightning_bfmoe import swap_feed_forward
from lightning_bfmoe.functional import group_by_expert, num_pairs, num_stages, pack_trits
from lightning_bfmoe.kernels import describe, library, ternary_linear, use_kernel
from lightning_bfmoe.kernels.cpu import plan, rotation, rotation_backward
from lightning_bfmoe.kernels.ternary import layout_of
from lightning_bfmoe.layers import ButterflyMoE, PackedSubstrate, moe_layers

SHAPES = ((512, 2048), (2048, 8192), (8192, 2048))
ROWS = (1, 2, 4, 8, 16, 32, 64)
BYTES = {"torch fp32": 4, "torch bf16": 2, "torch int8": 1, "onnxruntime 4-bit": 0.5 + 4 / 128,
         "onnxruntime 2-bit": 0.25 + 4 / 128}  # fmt: skip
flusher = torch.zeros(0)


def flush() -> None:
    """Empty the caches by reading 256 MiB."""
    global flusher
    if not flusher.numel():
        flusher = torch.ones(2**26)
    flusher.sum()


def medians(
    variants: dict[str, Callable[[], Any]], seconds: float, cold: bool = False
) -> dict[str, dict[str, float]]:
    """Median and least microseconds of each variant; they take turns until the time is used."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call(), call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, call in variants.items():
            if cold:
                flush()
            start = clock()
            call()
            times[name].append(clock() - start)
    return {
        "us": {name: 1e6 * statistics.median(found) for name, found in times.items()},
        "best_us": {name: 1e6 * min(found) for name, found in times.items()},
    }


def read_rate() -> float:
    """Bytes a second that torch reads from memory, best of some; by the clock of all times."""
    flush()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(20):
        start = clock()
        flush()
        best = min(best, clock() - start)
    return 4 * flusher.numel() / best


def one_matrix(seconds: float, rate: float) -> list[dict]:
    """Ours against the peers for one row, cold and hot; against torch for more rows."""
    records = []
    for d_out, d_in in SHAPES:
        trits, alpha = random_ternary(d_out, d_in)
        packed = pack_trits(trits, "2")
        calls = {name: build(trits, alpha) for name, build in products().items()}

        def ours(x: Tensor, p=packed, a=alpha, n=d_out) -> Tensor:
            with use_kernel("ternary", "cpu"):
                return ternary_linear(x, p, a, n, "2", lambda dtype: None)

        calls = {"ours": ours, **calls}
        x = torch.randn(1, d_in)
        true = torch.nn.functional.linear(x.double(), alpha.double() * trits)
        errors = {n: float((f(x).double() - true).norm() / true.norm()) for n, f in calls.items()}
        assert errors["ours"] <= 2 * errors["torch fp32"] and max(errors.values()) < 3e-2, errors
        size = {n: BYTES[n] * d_out * d_in for n in calls if n in BYTES}
        size["ours"] = layout_of(packed, d_out, d_in, "2").numel()
        limit = {name: 1e6 * value / rate for name, value in size.items()}
        for rows in ROWS:
            x = torch.randn(rows, d_in)
            names = calls if rows == 1 else ("ours", "torch fp32", "torch bf16")
            some = {name: calls[name] for name in names}
            variants = {n: partial(f, x) for n, f in some.items()}
            for cold in (True, False) if rows == 1 else (False,):
                records.append({
                    "d_out": d_out, "d_in": d_in, "rows": rows, "cold": cold,
                    **medians(variants, seconds * (2 if cold else 0.5), cold),
                    "limit_us": {n: limit[n] for n in variants}, "errors": errors,
                })  # fmt: skip
    return records


def one_token(seconds: float, rate: float, d: int = 2048) -> list[dict]:
    """A feed-forward layer of 64 experts, top-2, for one token."""
    ours = ButterflyMoE(d, 4 * d, 64, top_k=2).requires_grad_(False).eval()
    size = 0
    for linear in ours.experts.linears().values():
        linear.substrate = PackedSubstrate.from_substrate(linear.substrate, "2")
        for rotation_of in (linear.rotate_in, linear.rotate_out):
            rotation_of.freeze()
            size += 2 * rotation_of.angles[0].numel() * 2  # two experts, float16
        size += layout_of(linear.substrate.packed, linear.d_out, linear.d_in, "2").numel()
    x = torch.randn(1, d)
    parts, dense = use_kernel("linear", "parts"), use_kernel("ternary", "dense")
    with use_kernel("rotate", "reference"), parts, dense:
        plain = ours(x)
    error = float((ours(x) - plain).norm() / plain.norm())
    assert error < 1e-5, error
    for linear in ours.experts.linears().values():
        linear.substrate.keeps, linear.substrate.keeps = False, True  # drops the dense matrix
    peers = products()
    names = [n for n in ("torch bf16", "torch int8", "onnxruntime 4-bit") if n in peers]
    layers = {"ours": ours, **{name: StandardMoE(d, 4, peers[name]) for name in names}}
    sizes = {"ours": size, **{name: BYTES[name] * 4 * 4 * d * d for name in names}}
    variants = {name: partial(f, x) for name, f in layers.items()}
    return [
        {"d": d, "d_ff": 4 * d, "experts": 64, "top_k": 2, "cold": cold, "error": error,
         **medians(variants, 4 * seconds, cold),
         "limit_us": {n: 1e6 * s / rate for n, s in sizes.items()}}
        for cold in (True, False)
    ]  # fmt: skip


def rotations(seconds: float) -> list[dict]:
    """The kernel itself for one row; the op for many, beside a copy of the rows."""
    records = []
    for d in (512, 2048, 8192):
        x, angles = torch.randn(1, d), torch.randn(64, num_stages(d), num_pairs(d))
        counts, y = torch.zeros(64, dtype=torch.int64), torch.empty(1, d)
        counts[5] = 1
        pointers = [t.data_ptr() for t in (x, angles, counts, y)]
        network, rotate_c = plan(d, angles.shape[1]), library.library().bfmoe_rotate_f32
        variants = {
            "kernel": partial(rotate_c, network, *pointers, 1, 64, 0, 1),
            "op": partial(rotation, x, angles, counts, False),
        }
        records.append({"d": d, "rows": 1, **medians(variants, seconds / 2)})
    for d, rows in ((128, 1024), (512, 1024), (768, 1024), (2048, 1024)):
        x, grad, other = torch.randn(rows, d), torch.randn(rows, d), torch.empty(rows, d)
        angles = torch.randn(8, num_stages(d), num_pairs(d))
        counts = group_by_expert(torch.arange(rows)[:, None] % 8, 8).counts
        variants = {
            "copy": partial(other.copy_, x),
            "forward": partial(rotation, x, angles, counts, False),
            "backward": partial(rotation_backward, x, grad, angles, counts, False),
        }
        records.append({"d": d, "rows": rows, **medians(variants, seconds)})
    return records


def training_step(seconds: float) -> list[dict]:
    """The quickstart's model: dense, dense of equal active size (twice as wide), ButterflyMoE."""
    tokens, targets = torch.randint(0, 1024, (2, 8, 64)).unbind()

    def step_of(hidden: int | None, swap: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = GPT(vocab_size=1024, context=64, width=128, depth=3, heads=4, hidden=hidden)
        if swap:
            swap_feed_forward(model, num_experts=8, top_k=2)
            for _, layer in moe_layers(model):
                layer.set_blend(0.7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            model.loss((tokens, targets)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    variants = {
        "ours": step_of(None, True),
        "dense": step_of(None, False),
        "dense, twice as wide": step_of(1024, False),
    }
    return [{"model": "quickstart", **medians(variants, 6 * seconds)}]


def other_load(before: list[int], own_before: float) -> float:
    """Cores that other processes kept busy since then, from /proc/stat."""
    busy, own = (b - a for b, a in zip(jiffies(), before, strict=True)), sum(os.times()[:2])
    user, nice, system, idle = busy
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = (user + nice + system + idle) / ticks / (os.cpu_count() or 1)
    return round(max(0.0, ((user + nice + system) / ticks - (own - own_before)) / seconds), 2)


def jiffies() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split()[1:5]]


def show(content: dict) -> None:
    """A line a case: our time, its multiple of the memory's limit, and how many times faster."""
    for part, records in content["parts"].items():
        for record in records:
            us = dict(record["us"])
            head = {k: v for k, v in record.items() if not isinstance(v, dict | float)}
            first = next(iter(us))
            line = f"{part:10} {' '.join(f'{k}={v}' for k, v in head.items()):50}"
            line += f" {first} {us[first]:.0f} us"
            if "limit_us" in record:
                line += f" ({us[first] / record['limit_us'][first]:.1f}x limit)"
            print(line, *(f"{n} {us[n] / us[first]:.2f}x" for n in us if n != first), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=0.6, help="unit of time for a case")
    parser.add_argument("--parts", nargs="+", default=["matrix", "token", "rotation", "step"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rate, s = read_rate(), options.seconds
    before, own = jiffies(), sum(os.times()[:2])
    runs = {
        "matrix": lambda: one_matrix(s, rate), "token": lambda: one_token(s, rate),
        "rotation": lambda: rotations(s), "step": lambda: training_step(s),
    }  # fmt: skip
    parts = {}
    for name in options.parts:
        with torch.set_grad_enabled(name == "step"):
            parts[name] = runs[name]()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    content = {
        "device": processor(), "threads": options.threads, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit.stdout.strip(),
        "instruction_set": library.library().bfmoe_cpu_level(), "kernels": describe().splitlines(),
        "read_gb_per_s": rate / 1e9, "other_load_cores": other_load(before, own),
        "method": "medians of interleaved calls; CPU time for one thread, else wall clock",
        "parts": parts,
    }  # fmt: skip
    print(f"{content['device']}, {rate / 1e9:.1f} GB/s, other load {content['other_load_cores']}")
    show(content)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
