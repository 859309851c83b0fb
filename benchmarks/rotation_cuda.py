"""Rotation on one GPU: time as a multiple of a device copy of the same tensor; correctness first.

    python benchmarks/rotation_cuda.py [--out FILE] [--tune]

Rows are bf16, spread over the experts at random. Each figure is the median of do_bench over fresh
inputs; the copy is timed beside it in the same run.
"""

import argparse
import itertools
import json
import platform
import subprocess

import torch
import triton
from triton.testing import do_bench

from lightning_bfmoe.functional import apply_butterfly, group_by_expert, num_pairs, num_stages
from lightning_bfmoe.kernels import cuda

SIZES = [(512, 65536), (768, 65536), (1024, 32768), (2048, 32768), (4096, 16384), (8192, 16384)]
EXPERTS = [8, 64, 256]


def case(d: int, rows: int, experts: int, dtype: torch.dtype = torch.bfloat16):
    """Random rows, angles and groups on the GPU."""
    x = torch.randn(rows, d, device="cuda", dtype=dtype)
    angles = torch.randn(experts, num_stages(d), num_pairs(d), device="cuda")
    groups = group_by_expert(torch.randint(0, experts, (rows, 1), device="cuda"), experts)
    return x, angles, groups


def check() -> list[dict]:
    """Relative error of output and gradients against float64 stages, in each dtype."""
    found = []
    for d, experts, inverse in itertools.product((48, 512, 768, 2048, 8192), (1, 7), (False, True)):
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
            x, angles, groups = case(d, 300, experts, dtype)
            x.requires_grad_(), angles.requires_grad_()
            up = torch.randn_like(x)
            y = cuda.rotate_cuda(x, angles, groups, inverse)
            ours = (y, *torch.autograd.grad(y, (x, angles), up))
            wide = x.detach().double().requires_grad_(), angles.detach().double().requires_grad_()
            exact = apply_butterfly(wide[0], wide[1][groups.expert], inverse)
            exact = (exact, *torch.autograd.grad(exact, wide, up.double()))
            errors = [
                float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)
            ]
            assert max(errors) < limit, (d, experts, inverse, dtype, errors)
            found.append({"d": d, "dtype": str(dtype), "errors": errors})
    return found


def time_one(d: int, rows: int, experts: int) -> dict:
    """Milliseconds and multiples of a copy."""
    x, angles, groups = case(d, rows, experts)
    other = torch.empty_like(x)
    copy = do_bench(lambda: other.copy_(x), return_mode="median")
    forward = do_bench(lambda: cuda.rotate_cuda(x, angles, groups), return_mode="median")
    y = cuda.rotate_cuda(x, angles, groups)
    grad = torch.randn_like(x)
    backward = do_bench(
        lambda: cuda.fused_rotation_backward(y, grad, angles, groups.counts, False),
        return_mode="median",
    )
    return {
        "d": d, "rows": rows, "experts": experts, "copy_ms": copy, "forward_ms": forward,
        "backward_ms": backward, "forward_over_copy": forward / copy,
        "both_over_copy": (forward + backward) / copy,
    }  # fmt: skip


def tune() -> None:
    """Print the times of several launch shapes."""
    for d, backward in itertools.product((512, 1024, 2048, 4096), (False, True)):
        x, angles, groups = case(d, 32768, 64)
        y, grad = cuda.rotate_cuda(x, angles, groups), torch.randn_like(x)
        other = torch.empty_like(x)
        copy = do_bench(lambda a=x, b=other: b.copy_(a), return_mode="median")
        line = [f"d={d} {'bwd' if backward else 'fwd'} copy {copy:.4f}"]
        for numbers, warps in itertools.product((2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)):
            height = numbers // d
            if height < 1 or not 8 <= numbers // (32 * warps) <= 128:
                continue
            cuda._launch_shape = lambda *_, h=height, w=warps, **__: (h, w)
            if backward:
                ms = do_bench(
                    lambda a=angles, g=groups, y=y, r=grad: cuda.fused_rotation_backward(
                        y, r, a, g.counts, False
                    ),
                    warmup=5, rep=30, return_mode="median",
                )  # fmt: skip
            else:
                ms = do_bench(
                    lambda a=angles, g=groups, x=x: cuda.rotate_cuda(x, a, g),
                    warmup=5, rep=30, return_mode="median",
                )  # fmt: skip
            line.append(f"{height}x{warps}:{ms / copy:.2f}")
        print(*line, flush=True)


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/rotation_cuda.json")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    errors = check()
    print(f"correct: {len(errors)} cases, worst error", max(max(e["errors"]) for e in errors))
    if options.tune:
        tune()
        return
    rows = [time_one(d, rows, experts) for d, rows in SIZES for experts in EXPERTS]
    for row in rows:
        sizes = f"d={row['d']:5} rows={row['rows']} experts={row['experts']:3}"
        forward, both = row["forward_over_copy"], row["both_over_copy"]
        print(f"{sizes}  copy {row['copy_ms']:.3f} ms  forward {forward:.2f}x  both {both:.2f}x")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip(), "errors": errors, "times": rows,
    }  # fmt: skip
    with open(options.out, "w") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
