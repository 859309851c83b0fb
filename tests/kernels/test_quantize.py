"""The compiled blend towards the ternary matrix: the same bits as the definition."""

import pytest
import torch

from lightning_bfmoe.functional import quantize_ternary
from lightning_bfmoe.kernels import blend_to_ternary, choose, library, use_kernel
from lightning_bfmoe.kernels.quantize import blended
from lightning_bfmoe.layers import Substrate

pytestmark = pytest.mark.skipif(bool(library.missing_cpu()), reason=library.missing_cpu() or "-")


def ties(w):
    w[0] = 0.0
    return w.round()


def not_finite(w):
    w[0, 0], w[-1, -1] = float("nan"), float("inf")
    return w


KINDS = {"plain": lambda w: w, "ties": ties, "not finite": not_finite, "tiny": lambda w: 1e-20 * w}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(512, 128), (7, 5), (1, 1), (33, 1000), (6, 3)])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("scale", ["lstsq", "absmean"])
def test_the_same_bits(shape, kind, granularity, scale):
    weight = KINDS[kind](torch.randn(shape)).requires_grad_()
    for blend in (0.0, 0.3, 0.7, 1.0):
        with use_kernel("quantize", "cpu"):
            ours = blend_to_ternary(weight, torch.tensor(blend), scale, granularity)
        true = quantize_ternary(weight, torch.tensor(blend), scale, granularity)
        torch.testing.assert_close(ours, true, rtol=0, atol=0, equal_nan=True)
        upstream = torch.randn(shape)
        assert torch.equal(torch.autograd.grad(ours, weight, upstream)[0], upstream)


def test_opcheck_threads_and_strided_weights():
    weight = torch.randn(1024, 512).t()
    before = torch.get_num_threads()
    one = blended(weight, torch.tensor(0.5), "lstsq", True)
    torch.set_num_threads(2)
    try:
        assert torch.equal(blended(weight, torch.tensor(0.5), "lstsq", True), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, quantize_ternary(weight, 0.5))
    torch.library.opcheck(blended, (weight[:9].requires_grad_(), torch.tensor(0.5), "lstsq", True))


def test_which_kernel_runs():
    weight, blend = torch.randn(4, 6), torch.tensor(0.5)
    rest = blend, "lstsq", "row", torch.float32
    assert choose("quantize", weight, *rest).name == "cpu"
    for other in (weight.double(), weight.to("meta")):
        assert choose("quantize", other, *rest).name == "reference"
    substrate = Substrate(6, 4)
    with use_kernel("quantize", "reference"):
        before = substrate.weight()
    assert torch.equal(substrate.weight(), before)
