"""The compiled CPU rotation beyond the common tests: torch's checks, threads, the library."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_bfmoe.errors import BFMoEError, ConfigError, ShapeError
from lightning_bfmoe.functional import group_by_expert, num_pairs, num_stages
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels import cpu, describe, library, rotate, use_kernel

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(bool(library.missing_cpu()), reason=library.missing_cpu() or "-")


def case(d=48, experts=3, rows=40, dtype=torch.float32, stages=None):
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    angles = torch.randn(experts, stages or num_stages(d), num_pairs(d), dtype=dtype)
    groups = group_by_expert(torch.randint(0, experts, (rows, 1)), experts)
    return x, angles.requires_grad_(), groups


def run(x, angles, groups, kernel="cpu", inverse=False):
    with use_kernel("rotate", kernel):
        y = rotate(x, angles, groups, inverse)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y, *torch.autograd.grad(y, (x, angles), upstream)


def python(code, **environment):
    """Run code in a fresh process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning:lightning_bfmoe", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@compiled
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("d", "stages"), [(8, None), (7, 2), (96, None)])
def test_opcheck(d, stages, inverse):
    x, angles, groups = case(d, stages=stages, dtype=torch.float64)
    torch.library.opcheck(cpu.rotation, (x, angles, groups.counts, inverse))
    fixed = x.detach(), torch.randn_like(x), angles.detach(), groups.counts, inverse
    torch.library.opcheck(cpu.rotation_backward, fixed)


@compiled
@pytest.mark.slow
def test_compiles_without_a_graph_break():
    code = """
import torch
from lightning_bfmoe.functional import group_by_expert
from lightning_bfmoe.kernels import rotate

def step(x, angles, chosen):
    groups = group_by_expert(chosen, 3)
    return rotate(rotate(x, angles, groups).tanh(), angles, groups, inverse=True)

torch.manual_seed(0)
fast = torch.compile(step, fullgraph=True, backend="aot_eager")
for rows in (40, 24, 11):
    x = torch.randn(rows, 48, requires_grad=True)
    angles = torch.randn(3, 6, 24, requires_grad=True)
    chosen = torch.randint(0, 3, (rows, 1))
    a, b = step(x, angles, chosen), fast(x, angles, chosen)
    torch.testing.assert_close(a, b)
    for p, q in zip(torch.autograd.grad(a.pow(3).sum(), (x, angles)),
                    torch.autograd.grad(b.pow(3).sum(), (x, angles))):
        torch.testing.assert_close(p, q)
print("same")
"""
    assert python(code) == "same"


class Rotates(torch.nn.Module):
    def __init__(self, angles):
        super().__init__()
        self.angles = torch.nn.Parameter(angles.detach())

    def forward(self, x, chosen):
        return rotate(x, self.angles, group_by_expert(chosen, self.angles.shape[0]))


@compiled
def test_exports_as_one_opaque_op():
    x, angles, groups = case()
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        Rotates(angles), (x.detach(), groups.expert.unsqueeze(1)),
        dynamic_shapes=({0: rows}, {0: rows}),
    )  # fmt: skip
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert targets.count("bfmoe.rotate_cpu.default") == 1
    x2, _, groups2 = case(rows=9)
    chosen = groups2.expert.unsqueeze(1)
    assert torch.equal(program.module()(x2, chosen), Rotates(angles)(x2, chosen))


@compiled
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("d", "load"), [(512, [700, 0, 3, 397]), (96, [0, 9000, 0, 0]), (33, [4000, 1, 1, 4001])]
)
def test_threads_agree_and_a_fixed_number_is_deterministic(d, load, inverse):
    x, angles, _ = case(d, experts=4, rows=sum(load))
    groups = group_by_expert(torch.arange(4).repeat_interleave(torch.tensor(load))[:, None], 4)
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results[threads], again = (run(x, angles, groups, "cpu", inverse) for _ in range(2))
            for a, b in zip(results[threads], again, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    exact = run(*(t.detach().double().requires_grad_() for t in (x, angles)), groups, "reference",
                inverse)  # fmt: skip
    for threads, result in results.items():
        assert torch.equal(result[0], results[1][0]) and torch.equal(result[1], results[1][1])
        for ours, true in zip(result, exact, strict=True):
            assert (ours - true).norm() <= 2e-6 * true.norm(), threads


@compiled
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through(bad):
    x, angles, groups = case(32, experts=2, rows=30)
    with torch.no_grad():
        x[3, 5] = bad
    y = rotate(x, angles, groups)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()
    with torch.no_grad():
        x[3, 5], angles[1, 0, 0] = 0.0, bad
    y = rotate(x, angles, groups)
    assert y[groups.expert == 1].isnan().all() and y[groups.expert == 0].isfinite().all()


@compiled
def test_angles_far_out_are_as_exact_as_torchs():
    far = torch.tensor([0.0, -0.0, 1e-30, 3.0, -7.0, 1e3, 9.99e3, -1e4, 1e5, 3e7, -1e20])
    angles, x = far[:, None, None], torch.tensor([[1.0, 0.0]]).expand(len(far), 2)
    groups = group_by_expert(torch.arange(len(far))[:, None], len(far))
    expected = torch.stack([far.double().cos(), far.double().sin()], 1).float()
    with use_kernel("rotate", "cpu"):
        torch.testing.assert_close(rotate(x, angles, groups), expected, rtol=0, atol=1.2e-7)


@compiled
def test_frozen_angles_and_strided_rows():
    x, angles, groups = case(64)
    wide = torch.randn(40, 128)
    upstream = torch.randn(64, 40).t()
    for inverse in (False, True):
        grads = {}
        for kernel in ("cpu", "reference"):
            leaf = wide.clone().requires_grad_()
            with use_kernel("rotate", kernel):
                y = rotate(leaf[:, ::2], angles.detach(), groups, inverse)
            grads[kernel] = (y, *torch.autograd.grad(y, leaf, upstream))
        for a, b in zip(*grads.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@compiled
def test_a_second_derivative_is_refused():
    x, angles, groups = case()
    y = rotate(x, angles, groups)
    (grad,) = torch.autograd.grad(y.square().sum(), angles, create_graph=True)
    with pytest.raises(BFMoEError, match=r"no second derivative.*use_kernel\(\"rotate\", \"blocks"):
        grad.sum().backward()


@compiled
def test_counts_that_do_not_add_up_are_refused():
    x, angles, groups = case()
    wrong = ExpertGroups(groups.order, groups.expert, groups.counts + 1)
    with pytest.raises(ShapeError, match=r"add up to the rows: got counts .* for 40 rows"):
        rotate(x, angles, wrong)


@compiled
def test_many_python_threads_and_a_forked_process():
    x, angles, groups = case(256, rows=3000)
    expected = rotate(x, angles, groups).detach()
    seen = []
    workers = [
        threading.Thread(target=lambda: seen.append(rotate(x, angles, groups))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(y, expected) for y in seen)
    with torch.no_grad():
        child = multiprocessing.get_context("fork").Process(
            target=lambda: rotate(x, angles, groups)
        )
        child.start()
    child.join(60)
    assert len(seen) == 4 and child.exitcode == 0


@compiled
@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_every_instruction_set_of_this_machine_gives_the_same(level):
    code = """
import torch
from lightning_bfmoe.functional import group_by_expert
from lightning_bfmoe.kernels import rotate, use_kernel
torch.manual_seed(0)
for d, dtype in ((512, torch.float32), (130, torch.float64), (35, torch.float32)):
    chosen = torch.tensor([0] * 15 + [1] * 3 + [2])  # many rows, a few, one
    groups = group_by_expert(chosen[:, None], 3)
    x, angles = torch.randn(19, d, dtype=dtype), torch.randn(3, 4, d // 2, dtype=dtype)
    ours, grads = [], []
    for name in ("cpu", "reference"):
        leaves = x.clone().requires_grad_(), angles.clone().requires_grad_()
        with use_kernel("rotate", name):
            y = rotate(*leaves, groups)
        ours.append((y, *torch.autograd.grad(y.pow(3).sum(), leaves)))
    for a, b in zip(*ours):
        assert (a - b).norm() < (2e-6 if dtype == torch.float32 else 1e-14) * b.norm()
from tests.kernels.test_ternary import check_threads
check_threads()
print("same")
"""
    assert python(code, BFMOE_CPU_LEVEL=level) == "same"


def fixed_case():
    groups = group_by_expert(torch.arange(60).remainder(3)[:, None], 3)
    x = torch.linspace(-1, 1, 60 * 48, dtype=torch.float64).sin().reshape(60, 48)
    angles = torch.linspace(-2, 2, 3 * 6 * 24, dtype=torch.float64).reshape(3, 6, 24)
    return x, angles, groups


def test_without_the_library_other_kernels_give_the_same():
    code = """
import json
from tests.kernels.test_cpu import fixed_case
from lightning_bfmoe.kernels import choose, describe, rotate
assert choose("rotate", *fixed_case()).name == "blocks"
assert "cannot run: switched off by BFMOE_CPU_LIBRARY" in describe()
print(json.dumps(rotate(*fixed_case()).tolist()))
"""
    without = torch.tensor(json.loads(python(code, BFMOE_CPU_LIBRARY="")), dtype=torch.float64)
    torch.testing.assert_close(rotate(*fixed_case()), without, rtol=0, atol=1e-13)


def test_a_missing_library_is_no_warning_and_a_broken_one_says_the_way_out(tmp_path):
    assert library.load_library(tmp_path / "none.so") == (
        None,
        "not compiled: no C++ compiler when the package was installed, or it failed",
    )
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(
        RuntimeWarning, match=r"broken\.so cannot be used.*Reinstall lightning-bfmoe"
    ):
        found, reason = library.load_library(broken)
    assert found is None and reason.startswith("unusable: ")


@compiled
def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    with pytest.warns(RuntimeWarning, match=r"interface version 2, this package needs 999.*BFMOE_"):
        assert library.load_library(library.BUILT)[0] is None


def test_forcing_a_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(library, "_found", (None, "not compiled: test"))
    assert "[cannot run: not compiled: test]" in describe()
    with (
        pytest.raises(
            ConfigError, match=r"'cpu' cannot run in this installation: got not compiled"
        ),
        use_kernel("rotate", "cpu"),
    ):
        pass
