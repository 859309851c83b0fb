"""The packed ternary product on the CPU, alone and with the rotations around it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe.errors import BFMoEError, ShapeError
from lightning_bfmoe.functional import group_by_expert, pack_trits
from lightning_bfmoe.kernels import choose, describe, library, ternary_linear, use_kernel
from lightning_bfmoe.kernels.linear import fused, suits_fused
from lightning_bfmoe.kernels.ternary import layout_of, product, product_backward
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE, CodedRotation, PackedSubstrate

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(bool(library.missing_cpu()), reason=library.missing_cpu() or "-")
SHAPES = [(1, 1), (3, 5), (16, 18), (48, 144), (65, 145), (257, 300), (300, 17), (64, 1000)]


def matrix(d_out, d_in, bits="2", scales="row"):
    trits = torch.randint(-1, 2, (d_out, d_in), dtype=torch.int8)
    alpha = torch.rand(d_out if scales == "row" else 1, 1) + 0.5
    return trits, alpha, pack_trits(trits, bits)


def run(x, packed, alpha, d_out, bits="2", kernel="cpu"):
    def dense(dtype):
        raise AssertionError("the packed product needs no dense matrix")

    with use_kernel("ternary", kernel):
        return ternary_linear(x, packed, alpha, d_out, bits, dense)


@compiled
@pytest.mark.parametrize("bits", ["1.6", "2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_numbers_come_out_exactly(shape, bits):
    """Every sum is an integer below 2^24, which float32 holds: the result has no error at all."""
    trits, _, packed = matrix(*shape, bits)
    for rows in (1, 2, 3, 7, 37):
        x = torch.randint(-99, 100, (rows, shape[1])).float()
        y = run(x, packed, torch.full((1, 1), 0.5), shape[0], bits)
        assert torch.equal(y, 0.5 * (x.double() @ trits.double().T).float())


@compiled
@pytest.mark.parametrize("shape", [*SHAPES[3:], (512, 2048)])
@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_the_error_is_at_most_twice_that_of_a_dense_float32_product(shape, scales):
    trits, alpha, packed = matrix(*shape, scales=scales)
    x = torch.randn(9, shape[1])
    true = F.linear(x.double(), alpha.double() * trits)
    plain = F.linear(x, alpha * trits)
    error, allowed = ((y - true).norm() for y in (run(x, packed, alpha, shape[0]), plain))
    assert error <= 2 * allowed


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_rounded_once(dtype):
    trits, alpha, packed = matrix(130, 200)
    x = torch.randn(4, 200).to(dtype)
    y = run(x, packed, alpha, 130)
    true = F.linear(x.double(), alpha.double() * trits)
    assert y.dtype == dtype
    assert ((y.double() - true).abs() <= torch.finfo(dtype).eps * true.abs() + 1e-6).all()


@compiled
def test_no_rows_strided_rows_and_rows_that_do_not_touch_each_other():
    trits, alpha, packed = matrix(70, 90)
    assert run(torch.empty(0, 90), packed, alpha, 70).shape == (0, 70)
    wide = torch.randn(180, 5)
    a, b = (
        run(wide.t()[:, ::2], packed, alpha, 70),
        run(wide[::2].t().contiguous(), packed, alpha, 70),
    )
    assert torch.equal(a, b)
    x = torch.randn(3, 90)
    for bad in (float("nan"), float("inf")):
        x[1, 4] = bad  # 0 * NaN is NaN in a dense product, and here
        y = run(x, packed, alpha, 70)
        assert not y[1].isfinite().any() and y[::2].isfinite().all()


def check_threads():
    """Called in this process, and by test_cpu.py in one for each instruction set."""
    before = torch.get_num_threads()
    for d_out, d_in in ((1, 2), (65, 145), (130, 300), (1024, 2048)):
        trits, alpha, packed = matrix(d_out, d_in, "1.6")
        for rows in (1, 2, 5, 33):
            x = torch.randn(rows, d_in)
            true = F.linear(x.double(), alpha.double() * trits)
            plain = F.linear(x, alpha * trits)
            seen = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                seen.append(product(x, packed, alpha, d_out, "1.6"))
            torch.set_num_threads(before)
            assert all(torch.equal(y, seen[0]) for y in seen)
            assert (seen[0] - true).norm() <= 2 * (plain - true).norm() + 1e-7 * true.norm()


@compiled
def test_threads_agree_bit_by_bit():
    check_threads()


@compiled
def test_opcheck_and_the_gradient_of_the_rows():
    trits, alpha, packed = matrix(21, 34)
    x = torch.randn(3, 34, requires_grad=True)
    torch.library.opcheck(product, (x, packed, alpha, 21, "2"))
    grad = torch.randn(3, 21)
    torch.library.opcheck(product_backward, (grad, packed, alpha, 34, "2"))
    (ours,) = torch.autograd.grad(product(x, packed, alpha, 21, "2"), x, grad)
    torch.testing.assert_close(ours, grad @ (alpha * trits))
    y = product(x, packed, alpha.requires_grad_(), 21, "2")
    with pytest.raises(BFMoEError, match="scales of a packed matrix are not trained"):
        y.sum().backward()


@compiled
def test_the_layout_is_made_once_and_follows_the_bytes():
    trits, alpha, packed = matrix(20, 30)
    x = torch.randn(2, 30)
    first = layout_of(packed, 20, 30, "2")
    run(x, packed, alpha, 20)
    with torch.inference_mode():
        run(x, packed, alpha, 20)
    assert layout_of(packed, 20, 30, "2") is first
    other, _, bytes_ = matrix(20, 30)
    packed.copy_(bytes_)
    torch.testing.assert_close(run(x, packed, alpha, 20), F.linear(x, alpha * other))
    twin = copy.deepcopy(packed)
    assert twin.__dict__ == {} and layout_of(twin, 20, 30, "2") is not first


@compiled
def test_what_does_not_fit_is_refused():
    _, alpha, packed = matrix(20, 30)
    with pytest.raises(ShapeError, match=r"float32 rows as a \(rows, d_in\) matrix"):
        product(torch.randn(2, 30).double(), packed, alpha, 20, "2")
    with pytest.raises(BFMoEError, match="trits at 2 bit take"):
        product(torch.randn(2, 31), packed, alpha, 20, "2")


def packed_layer(d_in=24, d_out=40, experts=5, gains=True, angles=torch.float16, **settings):
    layer = ButterflyLinear(d_in, d_out, experts, gains=gains, **settings).requires_grad_(False)
    for gain in (layer.gain_in, layer.gain_out):
        if gain is not None:
            gain += 0.2 * torch.randn_like(gain)
    if layer.bias is not None:
        layer.bias.normal_()
    layer.substrate = PackedSubstrate.from_substrate(layer.substrate)
    for side in ("rotate_in", "rotate_out"):
        rotation = getattr(layer, side)
        if angles == "int8":
            setattr(layer, side, CodedRotation.of(rotation.angles, 8))
        else:
            rotation.freeze(angles)
    return layer


def both(layer, x, experts):
    groups = group_by_expert(experts, layer.num_experts)
    rows = x.index_select(0, groups.order // experts.shape[1])
    with torch.no_grad(), use_kernel("linear", "cpu"):
        ours = layer(rows, groups)
    with torch.no_grad(), use_kernel("linear", "parts"), use_kernel("ternary", "dense"):
        return ours, layer(rows, groups)


@compiled
@pytest.mark.parametrize("angles", [torch.float16, torch.float32, torch.bfloat16, "int8"])
@pytest.mark.parametrize("d", [(2, 3), (24, 40), (32, 128), (512, 256), (33, 64)])
def test_one_call_equals_its_parts(d, angles):
    for gains, bias in ((True, True), (False, False)):
        layer = packed_layer(*d, gains=gains, bias=bias, angles=angles)
        for tokens, k in ((1, 1), (1, 2), (4, 2), (9, 1)):
            experts = torch.stack([torch.randperm(5)[:k] for _ in range(tokens)])
            ours, parts = both(layer, torch.randn(tokens, d[0]), experts)
            assert (ours - parts).norm() <= 2e-6 * parts.norm()
    ours, parts = both(layer, torch.randn(6, d[0]), torch.full((6, 1), 3))  # all on one expert
    assert (ours - parts).norm() <= 2e-6 * parts.norm()


@compiled
def test_one_call_takes_narrow_and_strided_rows_angles_far_out_and_two_threads():
    layer = packed_layer(256, 2048, angles=torch.float32)
    layer.rotate_out.angles[1, 2, 3] = 3e5
    experts = torch.tensor([[1, 4], [1, 0], [2, 1]])
    x = torch.randn(3, 512)[:, ::2]
    before = torch.get_num_threads()
    ours, parts = both(layer, x, experts)
    torch.set_num_threads(2)
    try:
        assert torch.equal(both(layer, x, experts)[0], ours)
    finally:
        torch.set_num_threads(before)
    assert (ours - parts).norm() <= 2e-6 * parts.norm()
    narrow = both(layer, x.bfloat16(), experts)
    true = both(layer, x.bfloat16().float(), experts)[1]
    errors = [(y.float() - true).norm() for y in narrow]
    assert narrow[0].dtype == torch.bfloat16 and errors[0] <= errors[1]


@compiled
def test_opcheck_of_the_whole_layer_and_experts_out_of_range():
    layer = packed_layer()
    numbers = (
        layer.substrate.packed, layer.substrate.alpha, 40, "1.6", layer.rotate_in.angles,
        layer.rotate_out.angles, layer.gain_in, None, layer.bias,
    )  # fmt: skip
    x = torch.randn(2, 24)
    torch.library.opcheck(fused, (x, torch.tensor([0, 4]), *numbers))
    with pytest.raises(ShapeError, match=r"numbered from 0 to 4: got ids \[0, 5\]"):
        fused(x, torch.tensor([0, 5]), *numbers)


@compiled
def test_which_kernel_runs():
    layer = packed_layer(gains=False)
    packed, alpha = layer.substrate.packed, layer.substrate.alpha
    few, many = torch.randn(2, 24), torch.randn(100, 24)
    assert choose("ternary", few, packed).name == "cpu"
    for x in (many, few.double(), few[:0], few.clone().requires_grad_()):
        assert choose("ternary", x, packed).name == "dense"
    assert "sums looked up by the packed trits" in describe()
    groups = group_by_expert(torch.zeros(2, 1, dtype=torch.int64), 5)
    x = few.clone().requires_grad_()
    layer(x, groups).sum().backward()  # by its parts, which have gradients
    assert x.grad.abs().sum() > 0
    layer.substrate.keeps = False  # low memory: neither a dense matrix nor a layout stays
    with torch.no_grad():
        torch.testing.assert_close(
            layer(few, groups), both(layer, few, torch.zeros(2, 1).long())[1]
        )
    assert not suits_fused(few, (packed, alpha, few.double()))


@compiled
@pytest.mark.slow
def test_a_packed_layer_compiles_and_exports_with_an_opaque_product():
    code = """
import torch
from lightning_bfmoe.layers import ButterflyMoE
from tests.kernels.test_ternary import pack_all
torch.manual_seed(0)
layer = pack_all(ButterflyMoE(16, 32, 4, top_k=2, gains=True)).eval()
fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(8, 16),), dynamic_shapes=({0: rows},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("bfmoe.ternary_cpu.default") == 2, names
    x = torch.randn(5, 16)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same"


def pack_all(layer):
    for linear in layer.experts.linears().values():
        linear.requires_grad_(False)
        linear.substrate = PackedSubstrate.from_substrate(linear.substrate)
        linear.rotate_in.freeze(), linear.rotate_out.freeze()
    return layer


def fixed_case():
    torch.manual_seed(0)
    layer = pack_all(ButterflyMoE(16, 32, 4, top_k=2)).eval()
    with torch.no_grad():
        return layer(torch.linspace(-1, 1, 32).reshape(2, 16))


def test_without_the_library_a_packed_layer_gives_the_same():
    code = """
from lightning_bfmoe.kernels import describe
from tests.kernels.test_ternary import fixed_case
assert describe().count("switched off by BFMOE_CPU_LIBRARY") == 5
print(fixed_case().tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "BFMOE_CPU_LIBRARY": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    without = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(fixed_case(), without, rtol=1e-5, atol=1e-6)
