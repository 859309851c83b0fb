"""The ternary blend in Triton: on a GPU, and without one under the interpreter.

As in `test_rows_cuda.py` the checks take a device.
"""

import itertools

import pytest
import torch

from lightning_bfmoe.functional import quantize_ternary, ternarize
from lightning_bfmoe.kernels import blend_to_ternary, choose, quantize_cuda, use_kernel
from lightning_bfmoe.layers import Substrate
from tests.kernels.test_rows_cuda import DTYPES, in_a_process, with_triton

SHAPES = [(7, 5), (3, 100), (1, 1), (2, 9000)]
LARGE = [(2048, 512), (513, 2048), (300, 8192), (1000, 768), (64, 20000)]
KINDS = "absmean-row", "absmean-tensor", "lstsq-row"
BLENDS = 0.0, 0.3, 1.0


def check_ternary(weight, kind, full):
    """The scale that a ternary result must have, after a check of its trits; `full` is ours."""
    scale, granularity = kind.split("-")
    trits, alpha = ternarize(weight, scale, granularity)
    size, kept = weight.double().abs(), full != 0
    if scale == "absmean":  # a trit may differ where |w| / alpha is a rounding from 1/2
        edge = (size / alpha - 0.5).abs() < 1e-6
        assert torch.equal(full.sign(), trits.float().where(~edge, full.sign()))
        return alpha.double()
    # Near the best threshold gains differ by less than float32 shows: ours must be as good as any.
    ordered = size.sort(dim=1, descending=True).values.cumsum(dim=1)
    count = torch.arange(1, size.shape[1] + 1, device=size.device)
    best = (ordered / count.sqrt()).amax(dim=1)
    total, number = (size * kept).sum(dim=1), kept.sum(dim=1).clamp(min=1)
    assert (total / number.sqrt() >= best * (1 - 2e-7)).all()
    assert torch.equal(full.sign(), weight.sign() * kept)
    least = size.where(kept, torch.inf).amin(dim=1)
    assert (size.where(~kept, -1.0).amax(dim=1) <= least).all()  # the largest are kept
    return (total / number)[:, None]


def check_blend(device, shape, kind, dtype=torch.float32, blends=BLENDS, weight=None):
    """Equal to the definition but for the order in which a scale is summed."""
    if weight is None:
        weight = torch.randn(shape) * torch.rand(shape[0], 1)
        weight[0] = 0.0  # the floor of absmean
    weight = weight.to(device).requires_grad_()
    one = torch.tensor(1.0, device=device)
    full = quantize_cuda.quantize_cuda(weight, one, *kind.split("-"), torch.float32).detach()
    alpha = check_ternary(weight.detach(), kind, full)
    for blend in blends:
        value = torch.tensor(blend, device=device)
        ours = quantize_cuda.quantize_cuda(weight, value, *kind.split("-"), dtype)
        true = weight + blend * (alpha * full.sign() - weight)
        assert ours.dtype == dtype and ours.shape == true.shape
        if blend == 0:
            assert torch.equal(ours, weight.to(dtype))
        step = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        assert ((ours - true).abs() <= step * torch.maximum(weight.abs(), alpha)).all()
        upstream = torch.randn_like(ours)
        (grad,) = torch.autograd.grad(ours, weight, upstream)
        assert grad.dtype == torch.float32 and torch.equal(grad, upstream.float())


def hard_rows(width):
    """Rows with ties, several scales, a grid, few numbers, and all alike."""
    two = torch.cat([10 * torch.randn(3, width // 8), torch.rand(3, width - width // 8)], dim=1)
    return torch.cat([
        two, torch.randn(3, width).exp().exp(), torch.randint(-1, 2, (3, width)) * 0.37,
        torch.randint(-4, 5, (3, width)).float(), 1e-20 * torch.randn(2, width),
        torch.full((1, width), -2.0), torch.eye(width)[:2], torch.randn(2, width) ** 5,
    ])  # fmt: skip


def check_not_finite(device):
    """NaN spoils its row (or matrix) and no other; infinity shows too."""
    one = torch.tensor(1.0, device=device)
    for kind, bad in itertools.product(KINDS, (float("nan"), float("inf"))):
        scale, granularity = kind.split("-")
        weight = torch.randn(4, 9, device=device)
        weight[1, 2] = bad
        ours = quantize_cuda.quantize_cuda(weight, one, scale, granularity, torch.float32)
        true = quantize_ternary(weight, one, scale, granularity)
        assert torch.equal(ours.isfinite(), true.isfinite())
        assert torch.equal(ours.isnan(), true.isnan())


def check_opaque(device, backend):
    weight, blend = torch.randn(16, 4, device=device).t(), torch.tensor(0.5, device=device)
    for kind in KINDS:
        scale, granularity = kind.split("-")
        arguments = weight, blend, scale, granularity == "row", torch.bfloat16
        torch.library.opcheck(
            quantize_cuda.blended, (weight.clone().requires_grad_(), *arguments[1:])
        )
        found = quantize_cuda.blended(*arguments).float()
        true = quantize_ternary(weight, blend, scale, granularity)
        assert (found - true).abs().max() < 0.02
    leaf = weight.clone().requires_grad_()

    def step(weight, blend):
        return quantize_cuda.quantize_cuda(weight, blend, "absmean", "row", torch.float32).tanh()

    fast = torch.compile(step, fullgraph=True, backend=backend)
    outs = step(leaf, blend), fast(leaf, blend)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaf) for y in outs))
    first = torch.autograd.grad(step(leaf, blend).sum(), leaf, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), leaf)[0].isfinite().all()


def check_interpreted():
    """All of the above that an interpreter can run."""
    from tests.conftest import pytest_configure

    pytest_configure(None)
    for shape, kind in itertools.product(SHAPES, KINDS):
        check_blend("cpu", shape, kind)
    check_blend("cpu", (3, 70), "absmean-row", torch.float16)
    for width in (3, 40):
        check_blend("cpu", None, "lstsq-row", blends=(1.0,), weight=hard_rows(width))
    check_not_finite("cpu")
    check_opaque("cpu", "aot_eager")


def check_compiled():
    """Every launch without spilled registers, for a GPU that need not be there."""
    from tests.kernels.sm90 import check

    for d_in, scale in ((768, "absmean"), (20000, "absmean"), (768, "lstsq"), (16384, "lstsq")):
        check(quantize_cuda._Plan(64, d_in, scale, True).run)
    plan = quantize_cuda._Plan(1000, 777, "absmean", False)
    check(plan.sum, plan.run)


@with_triton
def test_interpreted():
    in_a_process(__name__, "check_interpreted", 1)


@with_triton
def test_compiles_for_a_gpu_without_spills():
    in_a_process(__name__, "check_compiled", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_values_and_gradients_on_a_gpu(shape, kind, dtype):
    if kind == "lstsq-row" and shape[1] > quantize_cuda.MAX_SEARCHED:
        return
    check_blend("cuda", shape, kind, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2, 3, 5, 40, 1000, 8192, 16384])
def test_least_squares_of_hard_rows_on_a_gpu(width):
    check_blend("cuda", None, "lstsq-row", weight=hard_rows(width))
    check_blend("cuda", None, "lstsq-row", weight=torch.randn(300, width))


@pytest.mark.gpu
def test_least_squares_is_not_chosen_by_itself():
    weight = torch.zeros(8, 8, device="cuda")
    for scale, name in (("absmean", "triton"), ("lstsq", "reference")):
        found = choose("quantize", weight, weight.sum(), scale, "row", torch.bfloat16)
        assert found.name == name


@pytest.mark.gpu
def test_the_rest_on_a_gpu():
    check_not_finite("cuda")
    check_opaque("cuda", "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("scale", ["absmean", "lstsq"])
def test_a_substrate_under_autocast_on_a_gpu(scale):
    substrate, x = Substrate(80, 96, scale=scale, device="cuda"), torch.randn(9, 96, device="cuda")
    found = []
    for name in ("triton", "reference"):
        with use_kernel("quantize", name), torch.autocast("cuda", dtype=torch.bfloat16):
            y = substrate.linear(x)
        assert y.dtype == torch.bfloat16
        found.append((y, *torch.autograd.grad(y.float().sin().sum(), substrate.latent)))
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_autocast_makes_the_weight_in_its_dtype():
    substrate, x = Substrate(6, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = substrate.linear(x)
        assert substrate.linear(x.double()).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.sum(), substrate.latent)
    assert grad.dtype == torch.float32
    assert torch.equal(y, x.bfloat16() @ substrate.weight(torch.bfloat16).t())
    weight = blend_to_ternary(substrate.latent, substrate.blend, dtype=torch.float16)
    assert torch.equal(weight, substrate.weight().half())
