"""The CUDA kernels without a GPU: their values under triton's interpreter, and compiled for sm_90.

Both run in processes of their own: whether triton interprets is decided when it is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bfmoe.functional import group_by_expert
from lightning_bfmoe.functional.butterfly import stage_pairs
from lightning_bfmoe.kernels import cuda, cuda_plan

ROOT = Path(__file__).parents[2]
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def python(code, **environment):
    """Run code in a fresh process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


COMMON = """
import torch
from triton.runtime import interpreter

as_triton = interpreter._patch_lang_tensor

# Triton 3.6 takes an array of one number for an int, which numpy 2.4 does not.
def patched(tensor, scope):
    as_triton(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

interpreter._patch_lang_tensor = patched
from lightning_bfmoe.functional import apply_butterfly, group_by_expert, num_pairs, num_stages
from lightning_bfmoe.kernels import cuda, cuda_plan

def case(d, experts, rows, dtype=torch.float32, stages=None, chosen=None):
    torch.manual_seed(d + rows)
    x = torch.randn(rows, d).to(dtype).requires_grad_()
    # Far enough out for every number of half turns.
    angles = 3 * torch.randn(experts, stages or num_stages(d), num_pairs(d))
    if chosen is None:
        chosen = torch.randint(0, experts, (rows,))
    return x, angles.requires_grad_(), group_by_expert(chosen[:, None], experts)

def errors(x, angles, groups, inverse, upstream=None):
    upstream = torch.randn_like(x) if upstream is None else upstream
    y = cuda.rotate_cuda(x, angles, groups, inverse)
    ours = y, *torch.autograd.grad(y, (x, angles), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, angles)]
    exact = apply_butterfly(wide[0], wide[1][groups.expert], inverse)
    exact = exact, *torch.autograd.grad(exact, wide, upstream.double())
    return [float((a.double() - b).detach().norm() / b.norm()) for a, b in zip(ours, exact)]

def check(limit, *arguments, inverse=False, **others):
    found = errors(*case(*arguments, **others), inverse)
    assert max(found) < limit, (arguments, others, inverse, found)
"""


def interpreted(code):
    return python(COMMON + code + "\nprint('same')", TRITON_INTERPRET="1") == "same"


@with_triton
def test_output_and_gradients_equal_the_definition():
    assert interpreted("""
for d in (2, 3, 6, 31, 48, 64, 130):
    for inverse in (False, True):
        check(1e-6, d, 2, 13, inverse=inverse)
check(1e-6, 256, 2, 5)
""")


@with_triton
def test_loads_stages_launch_shapes_and_rows():
    # Of 16-bit rows the interpreter truncates what the GPU rounds, hence twice a rounding.
    assert interpreted("""
cuda_plan.multiprocessors = lambda device: 1
check(1e-6, 8, 5, 1)
check(1e-6, 8, 5, 300, chosen=torch.randint(0, 2, (300,)) * 2 + 1)
check(1e-6, 32, 2, 9, stages=4, inverse=True)
check(1e-6, 24, 2, 9, stages=4)
check(8e-3, 16, 2, 20, dtype=torch.bfloat16)
check(1e-3, 16, 2, 20, dtype=torch.float16, inverse=True)
x, angles, groups = case(32, 2, 20)
wide = torch.randn(20, 64).requires_grad_()
assert max(errors(wide[:, ::2], angles, groups, False, torch.randn(32, 20).t())) < 1e-6
y = cuda.rotate_cuda(x, angles.detach(), groups)
(dx,) = torch.autograd.grad(y, x, y.detach())
assert (dx - x).norm() < 1e-6 * x.norm()
cuda_plan.multiprocessors = lambda device: 7
cuda_plan.plan_for.cache_clear()
cuda_plan.walk_parts = lambda regular, irregular, *_: [(0, 1), (1, 3), (3, regular + irregular)]
cuda_plan.launch_shape = lambda *_: cuda_plan.Launch(spread=2, rows=4, warps=2, resident=1)
check(1e-6, 32, 3, 150)
check(1e-6, 48, 3, 70, inverse=True)
derived = cuda_plan.Launch(2, 2, 1, resident=3, derive=True, near=True)
cuda_plan.launch_shape = lambda *_: derived
cuda_plan.plan_for.cache_clear()
check(1e-6, 32, 3, 150)
check(1e-6, 48, 2, 40, inverse=True)
cuda_plan.LIFT = False
cuda_plan.plan_for.cache_clear()
check(1e-6, 32, 2, 70, inverse=True)
""")


@with_triton
def test_opcheck_compile_and_no_second_derivative():
    assert interpreted("""
from lightning_bfmoe.errors import BFMoEError
x, angles, groups = case(4, 2, 5)
torch.library.opcheck(cuda.rotation, (x, angles, groups.counts, False))
fixed = x.detach(), torch.randn_like(x), angles.detach(), groups.counts, True
torch.library.opcheck(cuda.rotation_backward, fixed)

def step(x, angles):
    return cuda.rotate_cuda(cuda.rotate_cuda(x, angles, groups).tanh(), angles, groups, True)

fast = torch.compile(step, fullgraph=True, backend="aot_eager")
a, b = step(x, angles), fast(x, angles)
torch.testing.assert_close(a, b)
grads = [torch.autograd.grad(out.pow(3).sum(), (x, angles)) for out in (a, b)]
for p, q in zip(*grads):
    torch.testing.assert_close(p, q)
(grad,) = torch.autograd.grad(step(x, angles).square().sum(), angles, create_graph=True)
try:
    grad.sum().backward()
except BFMoEError as error:
    assert "no second derivative" in str(error)
else:
    raise AssertionError("differentiated twice")
""")


COMPILE = """
import os, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from lightning_bfmoe.functional import num_stages
from lightning_bfmoe.kernels import cuda_plan, triton_backward, triton_rotation, triton_tables

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = dict(p_angles="*fp32", p_counts="*i64", p_dangles="*fp32", p_scratch="*fp32",
             p_table="*fp32", p_partner="*i32", p_pair="*i32", p_plan="*i32", experts="i32",
             height="i32", programs="i32")

def report(kernel, warps, registers=None, **constants):
    types = {name: TYPES.get(name, "*bf16") for name in kernel.arg_names if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]]
               for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    options |= {"maxnreg": registers} if registers else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True)
    return done.stdout.split("Function", 1)[1]

def check(width, backward, launch=None):
    regular, irregular = cuda_plan.fused_stages(width, num_stages(width))
    log_d = (width - 1).bit_length()
    launch = launch or cuda_plan.launch_shape(log_d, irregular, backward)
    sizes = dict(WIDTH=width, REGULAR=regular, IRREGULAR=irregular, DOWN=backward, LIFT=True,
                 DERIVE=launch.derive)
    shape = dict(LOG_D=log_d, SPREAD=launch.spread, ROWS=launch.rows, WARPS=launch.warps,
                 NEAR=launch.resident if launch.near else 1)
    if backward:
        summed = {name: value for name, value in sizes.items() if name != "DERIVE"}
        report(triton_tables.collect_kernel, 4, **summed, HEIGHT=2, PIECES=32, BLOCK=128, WARPS=4)
        ((first, stop),) = cuda_plan.walk_parts(regular, irregular, True, launch)
        found = report(triton_backward.rotate_back_kernel, launch.warps, launch.registers, **sizes,
                       **shape, FIRST=first, STOP=stop, SHARED=launch.shared)
    else:
        report(triton_tables.prepare_kernel, 4, **sizes, LOG_D=log_d, BLOCK=256, WARPS=4)
        found = report(triton_rotation.rotate_kernel, launch.warps, launch.registers, **sizes,
                       **shape)
    assert "STACK:0" in found, (width, backward, found)
"""


@with_triton
def test_compiles_for_a_gpu_without_spills():
    shared = "cuda_plan.Launch(3, 2, 4, 4, 128, derive=True, near=True, shared=10)"
    calls = f"check(1024, True, {shared})\ncheck(768, False)\ncheck(1024, False)"
    assert python(f"{COMPILE}\n{calls}\nprint('fits')", TRITON_INTERPRET="0") == "fits"


def test_partners_of_irregular_stages():
    partner, pair = cuda_plan.irregular_tables(12, 4, 2, torch.device("cpu"))
    first, second = stage_pairs(12, 4)
    assert partner.shape == pair.shape == (2, 16)
    for row in range(2):
        assert torch.equal(partner[row, first[row + 2]].long(), second[row + 2])
        assert torch.equal(partner[row, second[row + 2]].long(), first[row + 2])
        assert torch.equal(pair[row, first[row + 2]].long(), torch.arange(6))
        assert (pair[row, second[row + 2]] == -1).all() and (pair[row, 12:] == -1).all()


def test_parts_cover_the_walk():
    for width, stages in ((8192, 13), (4096, 12), (768, 10), (6144, 13), (96, 7), (2, 1)):
        regular, irregular = cuda_plan.fused_stages(width, stages)
        launch = cuda_plan.launch_shape((width - 1).bit_length(), irregular, True)
        for down in (False, True):
            parts = cuda_plan.walk_parts(regular, irregular, down, launch)
            assert [s for a, b in parts for s in range(a, b)] == list(range(stages))


def test_a_gpu_is_needed_to_be_chosen():
    groups = group_by_expert(torch.zeros(3, 1, dtype=torch.int64), 1)
    assert not cuda.suits_cuda(torch.zeros(3, 8), torch.zeros(1, 3, 4), groups)


class Kernel:
    """A jit function that notes how it was called."""

    arg_names = ("p_x", "rows", "WIDTH", "BLOCK")

    def __init__(self):
        self.dispatched, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.dispatched.append((grid, arguments, constants))
            return {grid: lambda *arguments: self.launched.append(arguments)}

        return run


def test_later_calls_skip_the_dispatch_unless_an_address_is_odd():
    kernel, grid, made = Kernel(), (2, 1, 1), []
    call = cuda_plan.Call(kernel, {"BLOCK": 8, "WIDTH": 4, "OTHER": 1}, num_warps=4)
    for address in (40, 32, 64, 40):
        call(grid, (address,), lambda: made.append(1) or ("x",), 5)
    options = {"WIDTH": 4, "BLOCK": 8, "num_warps": 4, "enable_fp_fusion": True}
    assert kernel.dispatched == [(grid, ("x", 5), options)] * 3 and len(made) == 3
    assert kernel.launched == [(64, 5, 4, 8)]  # constants in the kernel's order
