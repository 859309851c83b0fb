"""Rotation on one GPU: time as a multiple of a device copy of the same tensor; correctness first.

    python benchmarks/rotation_cuda.py [--out FILE] [--tune]

Rows are spread over the experts at random. Each figure is the median of do_bench over replays of a
CUDA graph, so without the launch overhead of Python, with the cache flushed before each; the copy
is timed the same way beside it. --tune also compares launch shapes. The kernels are compiled by
several processes first.
"""

import argparse
import contextlib
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
from lightning_bfmoe.kernels import cuda
from lightning_bfmoe.kernels.cuda import Launch

SIZES = [
    (256, 65536), (512, 65536), (768, 32768), (1024, 32768), (1536, 16384), (2048, 32768),
    (4096, 16384), (8192, 8192),
]  # fmt: skip
EXPERTS = [8, 64, 256]
CHECKED = [2, 7, 48, 130, 256, 320, 512, 768, 1024, 2048, 3072, 4096, 8192]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NONE, BF16 = None, torch.bfloat16

# (spread, rows, warps, resident, registers) to compare, by (width, backward)
SHAPES = {
    (256, False): [(4, 4, 1, 16), (4, 2, 1, 24), (4, 8, 1, 8), (3, 4, 1, 24), (3, 8, 1, 16),
                   (5, 2, 1, 16), (5, 4, 1, 10), (4, 4, 4, 4)],
    (256, True): [(4, 2, 1, 9, 224), (4, 2, 1, 10, 200), (4, 1, 1, 12), (3, 4, 1, 10),
                  (3, 4, 1, 9, 224), (3, 2, 1, 16, 128), (4, 2, 4, 2), (3, 2, 4, 4, 128)],
    (512, False): [(4, 4, 1, 16), (4, 2, 1, 24), (4, 8, 1, 8), (3, 4, 2, 12), (3, 8, 2, 8),
                   (5, 2, 1, 16), (5, 4, 1, 10)],
    (512, True): [(4, 2, 1, 9, 224), (4, 1, 1, 11), (3, 4, 2, 4), (3, 4, 2, 5, 200),
                  (3, 2, 2, 8, 128), (4, 2, 2, 4, 240)],
    (1024, False): [(4, 4, 2, 8), (4, 2, 2, 12), (4, 8, 2, 4), (3, 4, 4, 6), (3, 8, 4, 4),
                    (5, 2, 1, 16), (5, 4, 1, 10)],
    (1024, True): [(4, 2, 2, 4, 240), (4, 2, 2, 4), (4, 1, 2, 5, 200), (4, 1, 2, 4), (3, 4, 4, 2),
                   (3, 4, 4, 2, 208), (3, 2, 4, 4, 128), (3, 2, 4, 3)],
    (2048, False): [(4, 4, 4, 4), (4, 2, 4, 6), (4, 8, 4, 2), (3, 4, 8, 3), (3, 8, 8, 2),
                    (5, 4, 2, 5), (5, 2, 2, 8)],
    (2048, True): [(4, 2, 4, 2), (4, 1, 4, 2), (4, 1, 4, 2, 208), (3, 4, 8, 1), (3, 2, 8, 2, 128)],
    (4096, False): [(4, 4, 8, 2), (4, 2, 8, 3), (4, 8, 8, 1), (3, 4, 16, 1), (5, 4, 4, 2)],
    (4096, True): [(4, 1, 8, 1), (4, 2, 8, 1), (4, 1, 8, 1, 224), (3, 2, 16, 1), (3, 1, 16, 1)],
    (768, False): [(4, 4, 2, 8), (3, 4, 4, 4), (4, 2, 2, 12), (3, 2, 4, 6)],
    (768, True): [(3, 2, 4, 3), (4, 1, 2, 4), (3, 1, 4, 3), (3, 2, 4, 4, 128)],
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
    before = cuda.launch_shape
    if shape is not None:
        cuda.launch_shape = lambda *_: shape
    try:
        yield
    finally:
        cuda.launch_shape = before


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
    if (old := before()) is not None:
        for d in [d for d, _ in SIZES if d & (d - 1) == 0][part::parts]:
            x, angles, groups = case(d, 8, 2)
            old.backward(old.forward(x, angles, groups.counts), x, angles, groups.counts)
    torch.cuda.synchronize()


def before():
    """The kernel before this one, while its file is still here."""
    try:
        import rotation_old
    except ImportError:
        return None
    return rotation_old


def whole(d: int) -> bool:
    """Whether every stage of a width is fused."""
    return sum(cuda.fused_stages(d, num_stages(d))) == num_stages(d)


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


def time_one(d: int, rows: int, experts: int, dtype: torch.dtype, old) -> dict:
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

    found = {
        "d": d, "rows": rows, "experts": experts, "dtype": str(dtype), "copy_ms": copy,
        "forward_ms": forward, "backward_ms": backward, "forward_over_copy": forward / copy,
        "both_over_copy": (forward + backward) / copy,
        "eager_both_ms": do_bench(eager, warmup=5, rep=25, return_mode="median"),
    }  # fmt: skip
    if old is not None and d & (d - 1) == 0:
        with torch.no_grad():
            ahead = milliseconds(lambda: old.forward(x, angles, counts))
            back = milliseconds(lambda: old.backward(y, grad, angles, counts))
        found |= {
            "old_forward_over_copy": ahead / copy,
            "old_both_over_copy": (ahead + back) / copy,
        }
    return found


def tune(experts: int = 64) -> list[dict]:
    """Times of several launch shapes, as multiples of a copy."""
    rows_of, found = dict(SIZES), []
    for (d, backward), shapes in SHAPES.items():
        x, angles, groups = case(d, rows_of[d], experts)
        y, grad, counts = torch.empty_like(x), torch.randn_like(x), groups.counts
        copy = milliseconds(lambda a=x, b=y: b.copy_(a))
        line = []
        for shape in shapes:
            try:
                with launched(Launch(*shape)):
                    if backward:
                        ms = milliseconds(
                            lambda a=angles, c=counts, y=y, g=grad: cuda.rotation_backward(
                                y, g, a, c, False
                            )
                        )
                    else:
                        ms = milliseconds(
                            lambda a=angles, c=counts, x=x: cuda.rotation(x, a, c, False)
                        )
            except Exception as error:  # a shape that does not fit is a result too
                line.append(f"{'/'.join(map(str, shape))}:{type(error).__name__}")
                continue
            found.append({"d": d, "backward": backward, "shape": shape, "over_copy": ms / copy})
            line.append(f"{'/'.join(map(str, shape))}:{ms / copy:.2f}")
        print(f"d={d} {'bwd' if backward else 'fwd'} copy {copy:.4f}  ", *line, flush=True)
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
        if "old_both_over_copy" in row:
            old = row["old_forward_over_copy"], row["old_both_over_copy"]
            line += f"  (old {old[0]:.1f}x {old[1]:.1f}x)"
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
    try:
        import rotation_old as old
    except ImportError:
        old = None
    times = [time_one(d, rows, experts, BF16, old) for d, rows in SIZES for experts in EXPERTS] + [
        time_one(d, 32768, 64, torch.float32, None) for d in (256, 1024)
    ]
    table(times)
    print(f"timed after {time.time() - start:.0f} s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip(), "errors": errors, "times": times,
        "shapes": tune() if options.tune else [],
    }  # fmt: skip
    out = Path(options.out)
    out = out / "rotation_cuda.json" if out.is_dir() else out
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"done after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
