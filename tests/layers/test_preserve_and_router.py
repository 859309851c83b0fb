"""Function preservation, presets, the router's balance, and the losses that act from inside."""

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional import switch_loss, z_loss
from lightning_bfmoe.layers import ButterflyMoE, attach_loss, set_loss_scale, update_balance


def dense(d_model=12, d_ff=20, d_out=12, gated=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "up": (d_ff, d_model),
        "down": (d_out, d_ff),
        "up_bias": (d_ff,),
        "down_bias": (d_out,),
    }
    if gated:
        shapes |= {"gate": (d_ff, d_model), "gate_bias": (d_ff,)}
    return {k: torch.randn(s, generator=g) / s[-1] ** 0.5 for k, s in shapes.items()}


def dense_forward(x, w, act):
    hidden = F.linear(x, w["up"], w["up_bias"])
    hidden = (
        act(hidden) if "gate" not in w else act(F.linear(x, w["gate"], w["gate_bias"])) * hidden
    )
    return F.linear(hidden, w["down"], w["down_bias"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("base", [0.0, torch.pi / 4, 1.0])
@pytest.mark.parametrize(("d_model", "d_ff"), [(12, 20), (16, 64), (7, 13), (24, 48)])
def test_equal_angles_preserve_a_dense_network_for_any_router(gated, base, d_model, d_ff):
    layer = ButterflyMoE(
        d_model, d_ff, num_experts=6, top_k=3, gated=gated, activation="silu", angle_std=0.0
    )
    for linear in layer.experts.linears().values():
        with torch.no_grad():
            linear.rotate_in.angles.fill_(base)
            linear.rotate_out.angles.fill_(-base)
    weights = dense(d_model, d_ff, d_model, gated)
    layer.load_dense_(**weights)
    layer.set_blend(0.0)
    x = torch.randn(50, d_model)
    expected = dense_forward(x, weights, F.silu)
    assert (layer(x) - expected).norm() / expected.norm() < 1e-5
    layer.set_blend(1.0)
    assert (layer(x) - expected).norm() / expected.norm() > 1e-2  # ternary does change it


def test_angle_noise_moves_the_function_a_little():
    layer = ButterflyMoE(64, 128, num_experts=4, activation="gelu", angle_std=0.02)
    weights = dense(64, 128, 64)
    layer.load_dense_(**weights)
    layer.set_blend(0.0)
    x = torch.randn(100, 64)
    expected = dense_forward(x, weights, F.gelu)
    assert 1e-3 < (layer(x) - expected).norm() / expected.norm() < 0.12


def test_loading_checks_shapes():
    layer = ButterflyMoE(12, 20, 2)
    weights = dense()
    with pytest.raises(
        ShapeError, match=r"maps 12 -> 20, so its weight is \(20, 12\): got \(12, 20\)"
    ):
        layer.load_dense_(**{**weights, "up": weights["up"].T})
    with pytest.raises(ShapeError, match=r"got a gate of shape \(20, 12\)"):
        layer.load_dense_(**weights, gate=weights["up"])
    with pytest.raises(ShapeError, match="a bias needs a layer that has one"):
        ButterflyMoE(12, 20, 2, bias=False).load_dense_(**weights)


def test_paper_preset_is_linear_before_a_dense_projection_and_has_no_balance_gradient():
    config = ButterflyMoEConfig.preset("paper", num_experts=4)
    layer = ButterflyMoE.from_config(config, 16, 32, activation="gelu").eval()
    assert (
        isinstance(layer.experts.down, torch.nn.Linear)
        and layer.experts.activation.name == "identity"
    )
    with torch.no_grad():
        layer.router.weight.zero_()
        for bias in (layer.experts.up.bias, layer.experts.down.bias):
            bias.zero_()
    x, y = torch.randn(2, 8, 16)
    torch.testing.assert_close(layer(x + y), layer(x) + layer(y), rtol=1e-4, atol=1e-5)
    assert layer.router.noise == 0.1 and layer.train().router(x).loss is None


def test_config_round_trip_and_errors():
    config = ButterflyMoEConfig(num_experts=64, top_k=4, init="scratch")
    assert ButterflyMoEConfig.from_dict(config.to_dict()) == config
    assert config.angle_std_or_default == 0.5
    with pytest.raises(ConfigError, match=r"known fields: got \['experts'\]"):
        ButterflyMoEConfig.from_dict({"experts": 3})
    with pytest.raises(ConfigError, match="init must be one of .*got init='random'"):
        ButterflyMoEConfig(init="random")
    with pytest.raises(ConfigError, match="preset must be one of .*got 'papr'"):
        ButterflyMoEConfig.preset("papr")
    with pytest.raises(
        ConfigError, match="num_experts must be an integer >= 1: got num_experts=True"
    ):
        ButterflyMoEConfig(num_experts=True)


def test_settings_rebuild_the_layer():
    layer = ButterflyMoE(12, 20, 3, 2, gated=True, activation="relu2", gains=True, z_weight=0.1)
    twin = ButterflyMoE.from_settings(layer.settings)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(twin(x), layer(x)) and twin.settings == layer.settings


def test_a_custom_activation_trains_with_the_layer():
    layer = ButterflyMoE(12, 20, 2, activation=torch.nn.PReLU())
    layer(torch.randn(9, 12)).square().sum().backward()
    assert layer.experts.activation.function.weight.grad.abs() > 0
    assert layer.settings["activation"] == "custom"


def test_balancing_evens_out_a_router_that_collapsed():
    layer = ButterflyMoE(12, 20, num_experts=8, top_k=2, balance_rate=0.005)
    with torch.no_grad():
        layer.router.weight.mul_(15)  # logits that differ between tokens, as a trained router's
        layer.router.weight[:2] += 0.5  # two experts win nearly everything
    x = torch.randn(512, 12) + 0.5
    layer(x)
    before = layer.last_routing.load.max() / layer.last_routing.load.float().mean()
    for _ in range(900):
        layer.router(x)
        update_balance(layer)
    layer(x)
    after = layer.last_routing.load.max() / layer.last_routing.load.float().mean()
    assert before > 3 and after < 1.5
    assert layer.router.balance_bias.mean().abs() < 1e-5


def test_balance_counts_all_micro_batches_and_not_evaluation():
    layer = ButterflyMoE(12, 20, num_experts=4, top_k=2)
    a, b = torch.randn(2, 10, 12)
    layer(a), layer(b)
    with torch.no_grad():
        layer(a)
    layer.eval()(a)
    assert layer.router.pending_load.sum() == 2 * 10 * 2
    update_balance(layer)
    assert layer.router.pending_load.sum() == 0 and layer.router.balance_bias.abs().max() > 0


@pytest.mark.parametrize(
    "weights", [{"switch_weight": 0.3}, {"z_weight": 0.2}, {"switch_weight": 0.3, "z_weight": 0.2}]
)
@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_inner_losses_equal_an_explicit_loss_term(weights, scale):
    """The root is multiplied by `scale`, as a GradScaler or gradient accumulation does."""
    inside = ButterflyMoE(12, 20, num_experts=4, **weights).double()
    outside = ButterflyMoE(12, 20, num_experts=4).double()
    x = torch.randn(30, 12, dtype=torch.float64)
    y = inside(x)
    set_loss_scale(inside, scale)  # after the forward pass: it is read in the backward pass
    (scale * y.square().mean()).backward()
    y = outside(x)
    logits = x @ outside.router.weight.T
    probs = logits.softmax(-1)
    extra = weights.get("switch_weight", 0) * switch_loss(probs, outside.last_routing.experts)
    extra = extra + weights.get("z_weight", 0) * z_loss(logits)
    (scale * (y.square().mean() + extra)).backward()
    for (name, p), q in zip(inside.named_parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10 * scale, msg=name)


def test_no_inner_loss_in_evaluation_or_without_gradients():
    layer = ButterflyMoE(12, 20, num_experts=4, switch_weight=1.0)
    x = torch.randn(30, 12)
    assert layer.router(x).loss is not None
    with torch.no_grad():
        assert layer.router(x).loss is None
    assert layer.eval().router(x).loss is None


def test_attach_loss_leaves_the_output_alone():
    w = torch.tensor(2.0, requires_grad=True)
    y = torch.randn(3, requires_grad=True)
    out = attach_loss(y, w**3, torch.tensor(1.0))
    assert torch.equal(out, y)
    out.sum().backward()
    assert w.grad == 12 and torch.equal(y.grad, torch.ones(3))
