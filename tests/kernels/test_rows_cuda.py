"""Grouping, dispatch and combine in Triton: on a GPU, and without one under the interpreter.

The checks take a device. The interpreter runs them in a process of its own, since triton decides
when it is imported whether it interprets.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional import combine, dispatch, group_by_expert
from lightning_bfmoe.kernels import choose, describe, groups_cuda, rows_cuda
from lightning_bfmoe.kernels.groups_cuda import group_cuda, grouped

ROOT = Path(__file__).parents[2]
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
FLOOR = 1e-6  # for float32 sums in another order
SIZES = [(1, 1, 3), (5, 3, 40), (70, 2, 300), (3, 9, 16), (2, 2, 5000), (9, 4, 1)]  # tokens, k, d
LARGE = [(1000, 2, 2048), (513, 8, 768), (300, 2, 4096), (40, 2, 9000), (4097, 1, 512)]
DTYPES = torch.float32, torch.bfloat16, torch.float16
LOADS = {
    "any": lambda *shape: torch.randint(0, 7, shape),
    "one": lambda *shape: torch.full(shape, 5),
    "two": lambda *shape: torch.randint(0, 2, shape) * 4 + 1,
}


def case(device, tokens, k, d, dtype=torch.float32, load="any"):
    """Tokens, rows, weights and groups of 7 experts, some of them without a row."""
    groups = group_by_expert(LOADS[load](tokens, k).to(device), 7)
    x, rows = (
        torch.randn(n, d, device=device).to(dtype).requires_grad_() for n in (tokens, tokens * k)
    )
    return x, rows, torch.rand(tokens, k, device=device, requires_grad=True), groups


def near(ours, plain, exact):
    """No further from the exact result than twice plain PyTorch in the same dtype."""
    for one, low, true in zip(ours, plain, exact, strict=True):
        assert one.dtype == low.dtype and one.shape == true.shape
        assert (one - true).norm() <= 2 * (low - true).norm() + FLOOR * true.norm()


def with_gradients(function, inputs, upstream, wide=False):
    """Output and gradients, in double if wide."""
    inputs = [t.detach().double() if wide else t.detach() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def check_rows(device, tokens, k, d, dtype, load="any"):
    """Dispatch and combine, outputs and every gradient."""
    x, rows, weights, groups = case(device, tokens, k, d, dtype, load)
    up, back = torch.randn_like(rows), groups._replace(back=groups.order.argsort())
    found = [
        with_gradients(lambda x, run=run, g=g: run(x, g, k), [x], up, wide)
        for run, g, wide in (
            (rows_cuda.dispatch_cuda, groups, False),
            (dispatch, back, False),
            (dispatch, groups, True),
        )
    ]
    assert torch.equal(found[0][0], found[1][0])
    near(*found)
    up = torch.randn_like(x)
    found = [
        with_gradients(lambda r, w, run=run, g=g: run(r, w, g), [rows, weights], up, wide)
        for run, g, wide in (
            (rows_cuda.combine_cuda, back, False),
            (combine, groups, False),
            (combine, groups, True),
        )
    ]
    near(*found)
    again = with_gradients(lambda r, w: rows_cuda.combine_cuda(r, w, groups), [rows, weights], up)
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def check_groups(device, slots, k, experts, chosen=None):
    """The same groups as the stable sort."""
    chosen = torch.randint(0, experts, (slots, k)) if chosen is None else chosen
    chosen = chosen.to(device)
    for choice in (chosen, chosen.t()):
        ours, true = group_cuda(choice, experts), group_by_expert(choice, experts)
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], true[:3], strict=True))
        assert torch.equal(ours.order[ours.back], torch.arange(slots * k, device=device))


def check_strided_and_empty(device):
    x, rows, weights, groups = case(device, 6, 2, 10)
    wide = torch.randn(12, 20, device=device)
    expected = combine(wide[:, ::2], weights.t().contiguous().t(), groups)
    ours = rows_cuda.combine_cuda(wide[:, ::2], weights.t().contiguous().t(), groups)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(
        rows_cuda.dispatch_cuda(wide.t()[:6], groups, 2), dispatch(wide.t()[:6], groups, 2)
    )
    (ours,) = torch.autograd.grad(rows_cuda.dispatch_cuda(x, groups, 2).sum(), x)  # expanded ones
    assert (ours == 2).all()
    x, rows, weights, groups = case(device, 0, 2, 8)
    assert rows_cuda.dispatch_cuda(
        x, group_cuda(torch.zeros(0, 2).long().to(device), 7), 2
    ).shape == (0, 8)
    y = rows_cuda.combine_cuda(rows, weights, groups)
    assert y.shape == (0, 8) and torch.autograd.grad(y.sum(), weights)[0].shape == (0, 2)
    with pytest.raises(ShapeError, match="a row for each slot .* got 3 rows"):
        rows_cuda.combined(torch.zeros(3, 8), torch.zeros(2, 2), torch.arange(4))
    with pytest.raises(
        ShapeError, match="dispatch takes a row for each slot .* 6 rows and 4 places"
    ):
        rows_cuda.dispatched(torch.zeros(3, 8), torch.arange(4), 2)


def check_second_derivatives(device):
    x, rows, weights, groups = case(device, 6, 2, 8)
    for inputs, ours, plain in (
        ([rows, weights], lambda r, w: rows_cuda.combine_cuda(r, w, groups),
         lambda r, w: combine(r, w, groups)),
        ([x], lambda x: rows_cuda.dispatch_cuda(x, groups, 2), lambda x: dispatch(x, groups, 2)),
    ):  # fmt: skip
        seconds = []
        for function, wide in ((ours, False), (plain, False), (plain, True)):
            own = [t.detach().double() if wide else t.detach() for t in inputs]
            own = [t.requires_grad_() for t in own]
            first = torch.autograd.grad(function(*own).tanh().sum(), own, create_graph=True)
            seconds.append(torch.autograd.grad(sum(g.sin().sum() for g in first), own))
        near(*seconds)


def check_opaque(device, backend):
    """Opcheck, and no break in a compiled graph."""
    x, rows, weights, groups = case(device, 4, 2, 6)
    back, up = groups.order.argsort(), torch.randn(4, 6, device=device)
    torch.library.opcheck(rows_cuda.dispatched, (x, back, 2))
    torch.library.opcheck(rows_cuda.dispatched_backward, (rows, back, 2))
    torch.library.opcheck(rows_cuda.combined, (rows, weights, back))
    fixed = up, rows.detach(), weights.detach(), back
    torch.library.opcheck(rows_cuda.combined_backward, fixed)
    chosen = torch.randint(0, 7, (4, 2), device=device)
    torch.library.opcheck(grouped, (chosen, 7))

    def step(x, weights):
        found = group_cuda(chosen, 7)
        return rows_cuda.combine_cuda(rows_cuda.dispatch_cuda(x, found, 2).tanh(), weights, found)

    fast = torch.compile(step, fullgraph=True, backend=backend)
    outs = step(x, weights), fast(x, weights)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weights), up) for y in outs))


def check_interpreted():
    """All of the above that an interpreter can run."""
    from triton.runtime import interpreter

    from tests.conftest import pytest_configure

    as_triton = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # see test_cuda.py
        as_triton(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
    pytest_configure(None)
    for number, sizes in enumerate(SIZES):
        check_rows("cpu", *sizes, torch.float32, tuple(LOADS)[number % 3])
    check_groups("cpu", 1, 1, 3)
    check_groups("cpu", 8, 3, 33)
    check_groups("cpu", 50, 2, 9)
    check_groups("cpu", 300, 2, 9)
    check_strided_and_empty("cpu")
    check_second_derivatives("cpu")
    check_opaque("cpu", "aot_eager")


def check_compiled():
    """Every launch without spilled registers, for a GPU that need not be there."""
    from tests.kernels.sm90 import check

    for width, k in ((768, 2), (2048, 2), (9000, 9)):
        for weighted in (False, True):
            plan = rows_cuda._Plan(width, k, weighted)
            check(plan.gather, plan.spread)
    for experts, chunk, alone in (
        (8, 64, True),
        (8, 256, True),
        (8, 256, False),
        (1000, 256, False),
    ):
        plan = groups_cuda._Plan(experts, chunk, alone)
        check(plan.group, *([] if alone else [plan.count]))


def in_a_process(module, check, interpret):
    """Run a check of a test module where triton interprets, or compiles."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module} as here; here.{check}()"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "TRITON_INTERPRET": str(interpret), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@with_triton
def test_interpreted():
    in_a_process(__name__, "check_interpreted", 1)


@with_triton
def test_compiles_for_a_gpu_without_spills():
    in_a_process(__name__, "check_compiled", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES + LARGE, ids=str)
def test_values_and_gradients_on_a_gpu(sizes, dtype):
    for load in LOADS if sizes in LARGE[:2] else ("any",):
        check_rows("cuda", *sizes, dtype, load)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [1, 8, 64, 256, 1000])
def test_groups_on_a_gpu(experts):
    for slots, k in ((1, 1), (32, 2), (33, 2), (128, 2), (257, 1), (1000, 3), (16384, 2)):
        check_groups("cuda", slots, k, experts)
    check_groups("cuda", 5000, 2, experts, torch.full((5000, 2), experts - 1))


@pytest.mark.gpu
def test_the_rest_on_a_gpu():
    check_second_derivatives("cuda")
    check_opaque("cuda", "inductor")
    x, rows, weights, groups = case("cuda", 6, 2, 8)
    assert [k.name for k in (
        choose("group", groups.order, 7), choose("dispatch", x, groups, 2),
        choose("combine", rows, weights, groups),
    )] == ["triton"] * 3  # fmt: skip
    assert choose("combine", rows.double(), weights, groups).name == "reference"


@pytest.mark.gpu
def test_strided_and_empty_on_a_gpu():
    check_strided_and_empty("cuda")


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count():
    tokens, d = 2**19, 2056
    x = torch.randint(0, 99, (tokens, d), device="cuda", dtype=torch.int16).bfloat16()
    chosen = torch.randint(0, 64, (tokens, 2), device="cuda")
    groups = group_cuda(chosen, 64)
    rows = rows_cuda.dispatch_cuda(x, groups, 2)
    assert rows.numel() > 2**31 and torch.equal(rows[-1], x[groups.order[-1] // 2])
    y = rows_cuda.combine_cuda(rows, torch.full((tokens, 2), 0.5, device="cuda"), groups)
    assert torch.equal(y, x)


@pytest.mark.gpu
def test_replayed_in_a_cuda_graph_and_never_waits():
    chosen = torch.randint(0, 7, (40, 2), device="cuda")
    x, weights = torch.randn(40, 96, device="cuda"), torch.rand(40, 2, device="cuda")

    def step():
        groups = group_cuda(chosen, 7)
        return rows_cuda.combine_cuda(rows_cuda.dispatch_cuda(x, groups, 2), weights, groups)

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    chosen.copy_(torch.randint(0, 7, (40, 2)))
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, x * weights.sum(dim=1, keepdim=True))


def test_listed_with_what_is_missing_here():
    lines = [line for line in describe().splitlines() if line.split()[1] == "triton"]
    assert {"group", "dispatch", "combine", "quantize"} <= {line.split()[0] for line in lines}
    groups = group_by_expert(torch.zeros(3, 1, dtype=torch.int64), 1)
    assert choose("dispatch", torch.zeros(3, 8), groups, 1).name == "reference"
    assert choose("group", groups.order, 1).name == "reference"
