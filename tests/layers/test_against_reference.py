"""The layer against `functional.reference`: outputs and the gradient of every parameter."""

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe.functional.reference import OrbitMatrix, butterfly_moe_reference
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE

CASES = {
    "plain": {},
    "gated silu": {"gated": True, "activation": "silu", "bias": False},
    "gains": {"gains": True},
    "absmean per tensor": {"scale": "absmean", "granularity": "tensor"},
    "fewer stages": {"stages": 2},
    "odd sizes": {"d_model": 7, "d_ff": 15, "d_out": 6},
    "tanh, other width out": {"activation": "tanh", "d_out": 10},
}
FUNCTIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def build(dtype=torch.float64, num_experts=5, top_k=2, **settings):
    settings = {"d_model": 12, "d_ff": 20, **settings}
    layer = ButterflyMoE(num_experts=num_experts, top_k=top_k, seed=3, **settings).to(dtype)
    with torch.no_grad():  # leave no parameter at a special value
        for name, p in layer.named_parameters():
            p.add_(
                0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p)
            )
        layer.router.weight.mul_(5)
        layer.router.balance_bias.copy_(torch.randn(num_experts))
    return layer


def orbit(linear: ButterflyLinear, lam: float) -> OrbitMatrix:
    return OrbitMatrix(
        w=linear.substrate.latent, theta=linear.rotate_in.angles, phi=linear.rotate_out.angles,
        gain_in=linear.gain_in, gain_out=linear.gain_out, bias=linear.bias, lam=lam,
        scale=linear.substrate.scale, granularity=linear.substrate.granularity,
    )  # fmt: skip


def reference(layer: ButterflyMoE, x):
    experts = layer.experts
    return butterfly_moe_reference(
        x, layer.router.weight, orbit(experts.up, layer.blend), orbit(experts.down, layer.blend),
        None if experts.gate is None else orbit(experts.gate, layer.blend),
        top_k=layer.router.top_k, activation=FUNCTIONS[experts.activation.name],
        balance_bias=layer.router.balance_bias,
    )  # fmt: skip


def outputs_and_gradients(function, layer, x, upstream):
    parameters = dict(layer.named_parameters())
    out = function(x)
    grads = torch.autograd.grad(out, [x, *parameters.values()], upstream)
    return {"output": out, "x": grads[0], **dict(zip(parameters, grads[1:], strict=True))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_output_and_every_gradient(name, blend):
    layer = build(**CASES[name])
    layer.set_blend(blend)
    x = torch.randn(9, layer.d_model, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, layer.d_out, dtype=torch.float64)
    ours = outputs_and_gradients(layer, layer, x, upstream)
    oracle = outputs_and_gradients(lambda x: reference(layer, x), layer, x, upstream)
    assert ours.keys() == oracle.keys() and len(ours) >= 8
    for key, expected in oracle.items():
        assert expected.abs().max() > 0, f"{key}: a zero gradient proves nothing"
        error = (ours[key] - expected).norm() / expected.norm()
        assert error < 1e-7, f"{key}: {error:.1e}"  # lambda itself is float32


@pytest.mark.parametrize("name", ["plain", "gated silu", "gains"])
def test_float32_relative_error(name):
    layer = build(torch.float32, **CASES[name])
    exact = build(torch.float64, **CASES[name])
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(16, layer.d_model, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(16, layer.d_out)
    ours = outputs_and_gradients(layer, layer, x, upstream)
    oracle = outputs_and_gradients(lambda x: reference(exact, x), exact, wide, upstream.double())
    for key, expected in oracle.items():
        error = (ours[key].double() - expected).norm() / expected.norm()
        assert error < 1e-6, f"{key}: {error:.1e}"


@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (32, 3)])
def test_loads_from_one_token_to_many(tokens, num_experts, top_k):
    layer = build(num_experts=num_experts, top_k=top_k)
    x = torch.randn(tokens, 12, dtype=torch.float64)
    error = (layer(x) - reference(layer, x)).norm() / reference(layer, x).norm()
    assert error < 1e-12


def test_all_tokens_on_one_expert():
    layer = build(num_experts=6, top_k=1)
    layer.router.balance_bias.copy_(torch.tensor([0.0, 0, 0, 1e6, 0, 0]))
    x = torch.randn(50, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)
    assert layer.last_routing.load.tolist() == [0, 0, 0, 50, 0, 0]


def test_gradcheck():
    layer = build(num_experts=3, d_model=4, d_ff=6)
    layer.set_blend(0.0)  # at lambda > 0 the straight-through gradient is not the derivative
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_expert_weight_is_the_references_matrix():
    layer = build(torch.float32, gains=True)
    up = layer.experts.up
    expected = orbit(up, 1.0).expert(2)
    torch.testing.assert_close(up.expert_weight(2), expected, rtol=1e-5, atol=1e-5)


def test_permuting_the_experts_changes_nothing():
    layer, permuted = build(), build()
    order = torch.randperm(5)
    with torch.no_grad():
        for (name, p), q in zip(layer.named_parameters(), permuted.parameters(), strict=True):
            q.copy_(p[order] if p.shape[0] == 5 and ("angles" in name or "router" in name) else p)
        permuted.router.balance_bias.copy_(layer.router.balance_bias[order])
    x = torch.randn(30, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), permuted(x), rtol=0, atol=1e-14)


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    layer = build().eval()
    x = torch.randn(31, 12, dtype=torch.float64)
    whole = layer(x)
    halves = torch.cat([layer(x[:7]), layer(x[7:])])
    torch.testing.assert_close(whole, halves, rtol=0, atol=1e-13)


def test_low_precision_inputs_err_at_most_twice_a_dense_network_in_that_dtype():
    layer = build(torch.float32, d_model=64, d_ff=128)
    layer.experts.load_dense_(torch.randn(128, 64) / 8, torch.randn(64, 128) / 11)
    with torch.no_grad():
        for linear in layer.experts.linears().values():
            linear.rotate_in.angles.copy_(
                linear.rotate_in.angles[:1].expand_as(linear.rotate_in.angles)
            )
            linear.rotate_out.angles.copy_(
                linear.rotate_out.angles[:1].expand_as(linear.rotate_out.angles)
            )
    layer.set_blend(1.0)
    up, down = (layer.experts.linears()[n].expert_weight(0).detach() for n in ("up", "down"))
    x = torch.randn(100, 64)
    exact = F.linear(F.gelu(F.linear(x, up)), down)
    for dtype in (torch.bfloat16, torch.float16):
        dense = F.linear(F.gelu(F.linear(x.to(dtype), up.to(dtype))), down.to(dtype)).float()
        ours = layer(x.to(dtype))
        assert ours.dtype == dtype
        assert (ours.float() - exact).norm() < 2 * (dense - exact).norm() + 1e-3 * exact.norm()
