"""Rotation on the CPU, every kernel and a plain copy side by side; correctness first.

    python benchmarks/rotation_cpu.py [--threads 2] [--out FILE] [--seconds 1.0]

Rows are float32, spread evenly over the experts. The variants of a case take turns, call by call,
and each figure is the best of its calls: other load only ever adds time. One thread is timed by its
own CPU time, which other programs lengthen least; more threads by the wall clock. The reference is
left out where its per-row angles would take more than 256 MiB.
"""

import argparse
import itertools
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

from lightning_bfmoe.functional import group_by_expert, num_pairs, num_stages
from lightning_bfmoe.kernels import rotate, use_kernel

WIDTHS, ROWS, EXPERTS = (128, 512, 768, 2048), (1, 256, 4096), (1, 8, 64)
KERNELS = ("reference", "blocks", "cpu")
RESULTS = Path(__file__).parent / "results"


def case(d, rows, experts, dtype=torch.float32):
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    angles = torch.randn(experts, num_stages(d), num_pairs(d), dtype=dtype, requires_grad=True)
    return x, angles, group_by_expert(torch.arange(rows)[:, None] % experts, experts)


def forward(kernel, x, angles, groups):
    with use_kernel("rotate", kernel), torch.no_grad():
        return rotate(x, angles, groups)


def both(kernel, x, angles, groups, grad):
    with use_kernel("rotate", kernel):
        y = rotate(x, angles, groups)
        return y.detach(), *torch.autograd.grad(y, (x, angles), grad)


def check():
    """Worst relative error of outputs and gradients by kernel, against float64 stages."""
    worst = dict.fromkeys(KERNELS, 0.0)
    for d, experts in itertools.product((*WIDTHS, 33, 130), (1, 5)):
        x, angles, groups = case(d, 100, experts)
        grad = torch.randn_like(x)
        wide = [t.detach().double().requires_grad_() for t in (x, angles)]
        exact = both("reference", *wide, groups, grad.double())
        for kernel in KERNELS:
            for ours, true in zip(both(kernel, x, angles, groups, grad), exact, strict=True):
                error = float((ours - true).norm() / true.norm())
                assert error < 3e-6, (kernel, d, experts, error)
                worst[kernel] = max(worst[kernel], error)
    return worst


def best_of_turns(variants, seconds):
    """Least microseconds of each variant; they take turns until the time is used."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(variants, float("inf"))
    for run in variants.values():
        run()
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        for name, run in variants.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        turns += 1
    return {name: 1e6 * value for name, value in best.items()}


def time_case(d, rows, experts, seconds):
    x, angles, groups = case(d, rows, experts)
    grad, other = torch.randn_like(x), torch.empty_like(x)
    big = rows * num_stages(d) * num_pairs(d) * 4 > 2**28
    kernels = [k for k in KERNELS if not (big and k == "reference")]
    copy = {"copy": lambda: other.copy_(x.detach())}
    found = {"d": d, "rows": rows, "experts": experts}
    for what, run in (
        ("forward_us", lambda k: forward(k, x, angles, groups)),
        ("forward_backward_us", lambda k: both(k, x, angles, groups, grad)),
    ):
        variants = {k: (lambda k=k, run=run: run(k)) for k in kernels}
        found[what] = best_of_turns({**copy, **variants}, seconds)
    return found


def row_of_table(found):
    cells = [f"{found['d']:5} {found['rows']:5} {found['experts']:7}"]
    for what in ("forward_us", "forward_backward_us"):
        us = found[what]
        slow = f"{us['reference'] / us['cpu']:7.1f}x" if "reference" in us else "      - "
        cells.append(
            f"{us['cpu']:10.0f} us {slow} {us['blocks'] / us['cpu']:6.1f}x"
            f" {us['cpu'] / us['copy']:7.1f}"
        )
    return " |".join(cells)


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and direction")
    parser.add_argument("--out", type=Path, default=RESULTS / "rotation_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    errors = check()
    print("correct; worst relative errors:", {k: f"{v:.1e}" for k, v in errors.items()})
    head = "    time of cpu   over ref over blocks in copies"
    print(f"    d  rows experts |{head:>40} (forward) |{head:>40} (forward + backward)")
    times = []
    for d, rows, experts in itertools.product(WIDTHS, ROWS, EXPERTS):
        times.append(time_case(d, rows, experts, options.seconds))
        print(row_of_table(times[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "device": processor(), "threads": options.threads, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit.stdout.strip(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "method": "best of interleaved calls beside other load; CPU time for 1 thread, else wall",
        "errors": errors, "times": times,
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
