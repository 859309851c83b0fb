"""Time of the fused kernels around the rotation, as multiples of the copy that moves their bytes.

    python benchmarks/fused_cuda.py --out benchmarks/results/fused_cuda.json

Grouping, dispatch, combine and the ternary blend, forward and backward, each against its definition
in plain PyTorch (first the numbers, then the times). The ideal is the bytes that must be read and
written once, at the rate of a large device copy. Times are medians of CUDA-graph replays, caches
flushed (without a graph for the definitions' backward passes). The full checks are in
`tests/kernels/test_rows_cuda.py` and `test_quantize_cuda.py`.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from lightning_bfmoe.functional import combine, dispatch, group_by_expert, quantize_ternary
from lightning_bfmoe.kernels import groups_cuda, quantize_cuda, rows_cuda

BF16 = torch.bfloat16
ROWS = [(16384, 2, 512), (16384, 2, 1024), (16384, 2, 2048), (16384, 4, 2048), (16384, 2, 4096)]
MATRICES = [(2048, 512), (8192, 2048), (2048, 8192)]


def milliseconds(function: Callable[[], object], graphed: bool = True) -> float:
    """Median time of a call, or of a replay of its CUDA graph, cache flushed."""
    if not graphed:
        return do_bench(function, warmup=5, rep=25, return_mode="median")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return do_bench(graph.replay, warmup=5, rep=25, return_mode="median")


def copy_rate() -> float:
    """Bytes per second, read and written, of a copy: the best of two sizes, graphed or not."""
    best = 0.0
    for size in (2**29, 2**30):
        x = torch.zeros(size, dtype=torch.int8, device="cuda")
        y = torch.empty_like(x)
        for graphed in (False, True):
            best = max(best, 2e3 * size / milliseconds(functools.partial(y.copy_, x), graphed))
    return best


def apart(ours: Tensor, plain: Tensor) -> float:
    """Relative distance."""
    return float((ours.float() - plain.float()).norm() / plain.float().norm())


def graded(
    function: Callable[..., Tensor], leaves: list[Tensor], up: Tensor
) -> Callable[[], object]:
    """The backward pass alone, on the stream of this forward pass, so not to be captured."""
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, up, retain_graph=True)


def rows_cases(tokens: int, k: int, d: int) -> list[tuple]:
    """(name, bytes, ours, plain) of all that moves rows."""
    chosen = torch.randint(0, 64, (tokens, k), device="cuda")
    groups = groups_cuda.group_cuda(chosen, 64)
    plain = groups._replace(back=None)
    x = torch.randn(tokens, d, device="cuda", dtype=BF16).requires_grad_()
    rows = torch.randn(tokens * k, d, device="cuda", dtype=BF16).requires_grad_()
    weights = torch.rand(tokens, k, device="cuda").requires_grad_()
    few, many, ids = x.numel() * 2, rows.numel() * 2, chosen.numel() * 8
    fixed, factor, token, back = rows.detach(), weights.detach(), x.detach(), groups.back
    plain_x = graded(lambda x: dispatch(x, plain, k), [x], fixed)
    plain_c = graded(lambda r, w: combine(r, w, plain), [rows, weights], token)
    return [
        ("group", 4 * ids, lambda: groups_cuda.group_cuda(chosen, 64)[0],
         lambda: group_by_expert(chosen, 64)[0]),
        ("dispatch", few + many, lambda: rows_cuda.dispatch_cuda(token, groups, k),
         lambda: dispatch(token, plain, k)),
        ("dispatch backward", few + many, lambda: rows_cuda.dispatched_backward(fixed, back, k),
         plain_x),
        ("combine", few + many, lambda: rows_cuda.combine_cuda(fixed, factor, groups),
         lambda: combine(fixed, factor, plain)),
        ("combine backward", few + 2 * many,
         lambda: rows_cuda.combined_backward(token, fixed, factor, back), plain_c),
    ]  # fmt: skip


def blend_cases(d_out: int, d_in: int) -> list[tuple]:
    """(name, bytes, ours, plain) of the blends, to bf16."""
    weight = torch.randn(d_out, d_in, device="cuda")
    one, found = torch.tensor(1.0, device="cuda"), []
    for scale, granularity, reads in (
        ("absmean", "row", 1), ("absmean", "tensor", 2), ("lstsq", "row", 1),
    ):  # fmt: skip
        setting = scale, granularity
        found.append((
            f"{scale} {granularity}", (4 * reads + 2) * weight.numel(),
            lambda s=setting: quantize_cuda.quantize_cuda(weight, one, *s, BF16),
            lambda s=setting: quantize_ternary(weight, one, *s).to(BF16),
        ))  # fmt: skip
    return found


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fused_cuda.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rate, records = copy_rate(), []
    print(f"copy {rate / 1e12:.2f} TB/s, read and written")
    jobs = [(dict(zip(("tokens", "k", "d"), s, strict=True)), rows_cases(*s)) for s in ROWS]
    jobs += [(dict(zip(("d_out", "d_in"), s, strict=True)), blend_cases(*s)) for s in MATRICES]
    for sizes, cases in jobs:
        for name, size, ours, plain in cases:
            pair = [y if isinstance(y, Tensor) else y[0] for y in (ours(), plain())]
            error = apart(*pair)
            assert error < 2e-2, (name, sizes, error)
            plain_ms = milliseconds(plain, graphed="backward" not in name)
            ms, ideal = milliseconds(ours), size / rate * 1e3
            times = {"ms": ms, "plain_ms": plain_ms, "ideal_ms": ideal}
            records.append({**sizes, "op": name, "error": error, **times})
            print(
                f"{name:18} {sizes!s:42} {ms:7.3f} ms  {ms / ideal:5.2f}x ideal"
                f"  plain {plain_ms:7.3f} ms  apart {error:.0e}",
                flush=True,
            )
    commit = os.environ.get("COMMIT") or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "commit": commit,
        "copy_bytes_per_second": rate,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**facts, "times": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
