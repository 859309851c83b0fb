"""Rotation on one GPU: time as a multiple of a device copy of the same tensor; correctness first.

    python benchmarks/rotation_cuda.py [--out FILE] [--tune]

Rows are spread over the experts at random. Each figure is the median of do_bench over replays of a
CUDA graph, so without the launch overhead of Python, with the cache flushed before each; the copy
is timed the same way beside it. --tune also compares launch shapes. The kernels are compiled by
several processes first.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.testing import do_bench

from lightning_bfmoe.functional import apply_butterfly, group_by_expert, num_pairs, num_stages
from lightning_bfmoe.kernels import cuda, cuda_plan
from lightning_bfmoe.kernels.cuda_plan import Launch

SIZES = [
    (256, 65536), (512, 65536), (768, 32768), (1024, 32768), (1536, 16384), (2048, 32768),
    (4096, 16384), (8192, 8192),
]  # fmt: skip
EXPERTS = [8, 64, 256]
CHECKED = [2, 7, 48, 130, 256, 320, 512, 768, 1024, 2048, 3072, 4096, 8192]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NONE, BF16 = None, torch.bfloat16

# Launch shapes to compare, by (width, backward); the first is the one in use. Fields of `Launch`:
# spread, rows, warps, resident, registers, derive, near, shared.
SHAPES = {
    (256, False): [(3, 8, 1, 16), (3, 8, 1, 16, NONE, 0, 1), (3, 8, 1, 16, 128, 1, 1)],
    (256, True): [(3, 2, 1, 16, 128), (3, 2, 1, 16, 128, 0, 1), (3, 2, 1, 16, 128, 1, 1),
                  (3, 4, 1, 16, 128, 1, 1, 8), (3, 4, 1, 16, 128, 0, 1, 8)],
    (512, False): [(3, 8, 2, 8), (3, 8, 2, 8, NONE, 0, 1), (3, 8, 2, 8, 128, 1, 1)],
    (512, True): [(3, 2, 2, 8, 128), (3, 2, 2, 8, 128, 0, 1), (3, 2, 2, 8, 128, 1, 1),
                  (3, 4, 2, 8, 128, 1, 1, 9), (3, 4, 2, 8, 128, 0, 1, 9)],
    (1024, False): [(3, 8, 4, 4), (3, 8, 4, 4, NONE, 0, 1), (3, 8, 4, 4, NONE, 1),
                    (3, 8, 4, 4, NONE, 1, 1)],
    (1024, True): [(3, 2, 4, 4, 128), (3, 2, 4, 4, 128, 0, 1), (3, 2, 4, 4, 128, 1),
                   (3, 2, 4, 4, 128, 1, 1), (3, 4, 4, 4, 128, 1, 1, 10),
                   (3, 2, 4, 4, 128, 1, 1, 10), (4, 2, 2, 4, NONE, 1)],
    (2048, False): [(4, 4, 4, 4), (4, 4, 4, 4, NONE, 0, 1), (4, 4, 4, 4, 128, 1),
                    (4, 4, 4, 4, 128, 1, 1), (3, 8, 8, 2, 128, 1, 1)],
    (2048, True): [(3, 2, 8, 2, 128), (3, 2, 8, 2, 128, 0, 1), (3, 2, 8, 2, 128, 1, 1),
                   (3, 4, 8, 2, 128, 1, 1, 11), (3, 4, 8, 2, 128, 0, 1, 11),
                   (3, 2, 8, 2, 128, 1, 1, 11), (4, 4, 8, 1, NONE, 1, 0, 11),
                   (4, 2, 4, 2, NONE, 1, 1)],
    (4096, False): [(4, 8, 8, 1), (4, 8, 8, 1, NONE, 1), (4, 4, 8, 2, 128, 1, 1),
                    (4, 4, 16, 1, 128, 1), (3, 8, 16, 1, 128, 1), (4, 4, 16, 1, 128)],
    (4096, True): [(4, 2, 8, 1), (4, 2, 8, 1, NONE, 1), (4, 2, 16, 1, 128, 1, 0, 12),
                   (3, 2, 16, 1, 128, 1, 0, 12), (3, 4, 16, 1, 128, 1, 0, 10),
                   (4, 2, 16, 1, 128, 0, 0, 12)],
    (8192, False): [(4, 4, 16, 1), (4, 2, 16, 1), (4, 4, 16, 1, 128, 1), (4, 2, 16, 1, 128, 1)],
    (8192, True): [(4, 1, 16, 1), (4, 1, 16, 1, 128, 1), (4, 1, 16, 1, 128, 1, 0, 11),
                   (4, 2, 16, 1, 128, 1, 0, 11), (4, 1, 16, 1, 128, 0, 0, 11)],
    (768, False): [(4, 4, 2, 6, 160), (4, 4, 2, 8), (4, 4, 2, 6, 160, 1), (3, 4, 4, 4)],
    (768, True): [(3, 2, 4, 3, 168), (3, 2, 4, 3, 168, 1), (3, 2, 4, 3, 168, 0, 1)],
    (1536, False): [(4, 4, 4, 3, 160), (4, 2, 4, 5), (3, 4, 8, 3), (3, 2, 8, 4),
                    (4, 2, 4, 5, NONE, 1)],
    (1536, True): [(3, 2, 8, 1, 168), (3, 1, 8, 2), (4, 1, 4, 2), (3, 1, 8, 2, NONE, 1)],
}  # fmt: skip


def case(d: int, rows: int, experts: int, dtype: torch.dtype = BF16):
    """Random rows, angles and groups on the GPU."""
    x = torch.randn(rows, d, device="cuda", dtype=dtype)
    angles = torch.randn(experts, num_stages(d), num_pairs(d), device="cuda")
    groups = group_by_expert(torch.randint(0, experts, (rows, 1), device="cuda"), experts)
    return x, angles, groups


@contextlib.contextmanager
def launched(shape: Launch | None):
    """Every kernel in one launch shape."""
    before = cuda_plan.launch_shape
    if shape is not None:
        cuda_plan.launch_shape = lambda *_: shape
    cuda_plan.plan_for.cache_clear()
    try:
        yield
    finally:
        cuda_plan.launch_shape = before
        cuda_plan.plan_for.cache_clear()


def plain(x, angles, groups, inverse, up):
    """The stages as PyTorch operations in the dtype of x: output and gradients."""
    x, angles = x.detach().requires_grad_(), angles.detach().to(x.dtype).requires_grad_()
    y = apply_butterfly(x, angles[groups.expert], inverse)
    return y, *torch.autograd.grad(y, (x, angles), up)


def check_one(d: int, experts: int, inverse: bool, dtype: torch.dtype, rows: int = 300) -> dict:
    """Relative errors of output and gradients against float64, ours and plain PyTorch's."""
    x, angles, groups = case(d, rows, experts, dtype)
    up = torch.randn_like(x)
    leaves = x.detach().requires_grad_(), angles.detach().requires_grad_()
    y = cuda.rotate_cuda(*leaves, groups, inverse)
    ours = y, *torch.autograd.grad(y, leaves, up)
    exact = plain(x.double(), angles.double(), groups, inverse, up.double())
    low = plain(x, angles, groups, inverse, up)
    errors, allowed = (
        [
            float((a.double() - b).detach().norm() / b.norm())
            for a, b in zip(some, exact, strict=True)
        ]
        for some in (ours, low)
    )
    floor = 1e-6 if dtype == torch.float32 else 0.0  # for sums over rows in another order
    bad = [e for e, a in zip(errors, allowed, strict=True) if not e <= 2 * a + floor]
    assert not bad, (d, experts, inverse, dtype, errors, allowed)
    again = torch.autograd.grad(cuda.rotate_cuda(*leaves, groups, inverse), leaves, up)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], again, strict=True)), "not deterministic"
    return {
        "d": d, "experts": experts, "inverse": inverse, "dtype": str(dtype), "errors": errors,
        "plain": allowed,
    }  # fmt: skip


def check_jobs() -> list[tuple]:
    """Arguments of `check_one`."""
    jobs = []
    for d, inverse in itertools.product(CHECKED, (False, True)):
        dtypes = DTYPES if d in (256, 768, 1024) else DTYPES[:2]
        jobs += [(d, 7, inverse, dtype) for dtype in dtypes]
    return [
        *jobs,
        (16, 300, False, BF16, 3000),
        (256, 1, False, BF16),
        (1024, 64, False, BF16),
        (512, 1, True, torch.float32),
    ]


def tune_jobs() -> list[tuple]:
    """(width, backward, shape), ours first."""
    return [(*key, Launch(*shape)) for key, shapes in SHAPES.items() for shape in shapes]


def warm(part: int, parts: int, tune: bool) -> None:
    """Compile a share of all kernels into triton's cache on disk."""
    for d, _, inverse, dtype, *_ in check_jobs()[part::parts]:
        x, angles, groups = case(d, 8, 2, dtype)
        y = cuda.rotation(x, angles, groups.counts, inverse) if whole(d) else None
        if y is not None:
            cuda.rotation_backward(y, y, angles, groups.counts, inverse)
    for d, backward, shape in (tune_jobs() if tune else [])[part::parts]:
        x, angles, groups = case(d, 8, 2)
        with launched(shape), contextlib.suppress(Exception):
            if backward:
                cuda.rotation_backward(x, x, angles, groups.counts, False)
            else:
                cuda.rotation(x, angles, groups.counts, False)
    torch.cuda.synchronize()


def whole(d: int) -> bool:
    """Whether every stage of a width is fused."""
    return sum(cuda_plan.fused_stages(d, num_stages(d))) == num_stages(d)


def warm_all(tune: bool) -> None:
    """`warm` in as many processes as there are cores."""
    parts = min(max((os.cpu_count() or 2) - 1, 1), 15)
    command = [sys.executable, __file__, *(["--tune"] if tune else []), "--warm"]
    workers = [subprocess.Popen([*command, f"{part},{parts}"]) for part in range(parts)]
    for worker in workers:
        worker.wait()


def milliseconds(function) -> float:
    """Median time of a replay of the function's CUDA graph, cache flushed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return do_bench(graph.replay, warmup=5, rep=25, return_mode="median")


def time_one(d: int, rows: int, experts: int, dtype: torch.dtype) -> dict:
    """Milliseconds and multiples of a copy."""
    x, angles, groups = case(d, rows, experts, dtype)
    other, grad, counts = torch.empty_like(x), torch.randn_like(x), groups.counts
    copy = milliseconds(lambda: other.copy_(x))
    forward = milliseconds(lambda: cuda.rotation(x, angles, counts, False))
    y = cuda.rotation(x, angles, counts, False)
    backward = milliseconds(lambda: cuda.rotation_backward(y, grad, angles, counts, False))
    leaves = x.requires_grad_(), angles.requires_grad_()

    def eager():
        torch.autograd.grad(cuda.rotate_cuda(*leaves, groups), leaves, grad)

    return {
        "d": d, "rows": rows, "experts": experts, "dtype": str(dtype), "copy_ms": copy,
        "forward_ms": forward, "backward_ms": backward, "forward_over_copy": forward / copy,
        "both_over_copy": (forward + backward) / copy,
        "eager_both_ms": do_bench(eager, warmup=5, rep=25, return_mode="median"),
    }  # fmt: skip


def results(d: int, backward: bool, x, y, grad, angles, counts) -> tuple:
    """What one direction computes."""
    if backward:
        return cuda.rotation_backward(y, grad, angles, counts, False)
    return (cuda.rotation(x, angles, counts, False),)


def tune(experts: int) -> list[dict]:
    """Times of several launch shapes, as multiples of a copy; each must agree with ours."""
    rows_of, found = dict(SIZES), []
    for (d, backward), shapes in SHAPES.items():
        x, angles, groups = case(d, rows_of[d], experts)
        grad, counts = torch.randn_like(x), groups.counts
        y = cuda.rotation(x, angles, counts, False)
        run = functools.partial(results, d, backward, x, y, grad, angles, counts)
        other, expected, line = torch.empty_like(x), run(), []
        copy = milliseconds(functools.partial(other.copy_, x))
        for shape in shapes:
            name = "/".join(str(int(v)) if v is not None else "-" for v in shape)
            try:
                with launched(Launch(*shape)):
                    error = max(
                        float((a.float() - b.float()).norm() / b.float().norm())
                        for a, b in zip(run(), expected, strict=True)
                    )
                    ms = milliseconds(run)
            except Exception as problem:  # a shape that does not fit is a result too
                line.append(f"{name}:{type(problem).__name__}")
                continue
            found.append({
                "d": d, "backward": backward, "experts": experts, "shape": shape,
                "over_copy": ms / copy, "apart": error,
            })  # fmt: skip
            line.append(f"{name}:{ms / copy:.2f}" + ("" if error < 3e-3 else f" WRONG {error:.0e}"))
        print(
            f"d={d} E={experts} {'bwd' if backward else 'fwd'} copy {copy:.4f} ", *line, flush=True
        )
    return found


def table(rows: list[dict]) -> None:
    """Print the times, one line a size."""
    for row in rows:
        line = (
            f"d={row['d']:5} rows={row['rows']:6} experts={row['experts']:3} "
            f"{row['dtype'].removeprefix('torch.'):8} copy {row['copy_ms']:.3f} ms  forward "
            f"{row['forward_over_copy']:.2f}x  both {row['both_over_copy']:.2f}x  eager both "
            f"{row['eager_both_ms'] / row['copy_ms']:.1f}x"
        )
        print(line, flush=True)


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/rotation_cuda.json")
    parser.add_argument("--tune", action="store_true", help="compare launch shapes")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        warm(*map(int, options.warm.split(",")), options.tune)
        return
    start = time.time()
    warm_all(options.tune)
    print(f"compiled after {time.time() - start:.0f} s", flush=True)
    errors = [check_one(*job) for job in check_jobs()]
    print(f"correct: {len(errors)} cases, {time.time() - start:.0f} s", flush=True)
    times = [time_one(d, rows, experts, BF16) for d, rows in SIZES for experts in EXPERTS] + [
        time_one(d, 32768, 64, torch.float32) for d in (256, 1024)
    ]
    table(times)
    print(f"timed after {time.time() - start:.0f} s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip(), "errors": errors, "times": times, "shapes": [],
    }  # fmt: skip
    out = Path(options.out)
    out = out / "rotation_cuda.json" if out.is_dir() else out
    for experts in (None, 8, 256) if options.tune else (None,):  # each part is kept
        record["shapes"] += [] if experts is None else tune(experts)
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"done after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
