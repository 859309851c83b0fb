"""Layers whose activations are rounded before they enter the ternary matrix."""

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional import apply_butterfly, group_by_expert, round_rows
from lightning_bfmoe.kernels import use_kernel
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE


def layer(activation_bits, **settings):
    return ButterflyMoE(
        16, 24, num_experts=4, seed=3, activation_bits=activation_bits, **settings
    ).double()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_rounds_between_rotation_and_product(bits):
    linear = ButterflyLinear(16, 24, 3, activation_bits=bits).double()
    groups = group_by_expert(torch.tensor([[0], [1], [2], [0]]), 3)
    x = torch.randn(4, 16, dtype=torch.float64)
    inside = apply_butterfly(x, linear.rotate_in.angles[groups.expert], inverse=True)
    inside = F.linear(round_rows(inside, bits), linear.substrate.weight(torch.float64))
    expected = apply_butterfly(inside, linear.rotate_out.angles[groups.expert])
    torch.testing.assert_close(linear(x, groups), expected, rtol=1e-12, atol=1e-12)


def test_rounding_rises_with_lambda():
    plain, rounded = layer(None), layer(4)
    x = torch.randn(9, 16, dtype=torch.float64)
    errors = []
    for blend in (0.0, 0.5, 1.0):
        plain.set_blend(blend)
        rounded.set_blend(blend)
        errors.append((plain(x) - rounded(x)).norm() / plain(x).norm())
    assert errors[0] == 0 and 0.01 < errors[1] < errors[2]


def test_every_parameter_and_the_input_have_a_gradient():
    moe = layer(8, gated=True, gains=True)
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    moe(x).square().sum().backward()
    for name, p in [("x", x), *moe.named_parameters()]:
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_the_width_travels_with_the_settings():
    config = ButterflyMoEConfig(activation_bits=8)
    moe = ButterflyMoE.from_config(config, 16, 24)
    assert moe.settings["activation_bits"] == moe.experts.down.activation_bits == 8
    assert ButterflyMoE.from_settings(moe.settings).experts.up.activation_bits == 8


def test_a_packed_layer_rounds_too(tmp_path):
    trained = torch.nn.Sequential(layer(4).float())
    x = torch.randn(7, 16)
    pack(trained, tmp_path / "model.bfmoe", angles="fp32")
    packed = load_packed(tmp_path / "model.bfmoe", torch.nn.Sequential(layer(4).float()))
    with torch.no_grad(), use_kernel("ternary", "dense"):  # the other one sums in another order
        assert packed(x).equal(trained(x))
        assert not packed(x).equal(torch.nn.Sequential(layer(None).float())(x))


@pytest.mark.parametrize("bits", [1, True, 8.0])
def test_other_widths_are_an_error(bits):
    with pytest.raises(ConfigError, match="from 2 to 16"):
        ButterflyMoEConfig(activation_bits=bits)
    with pytest.raises(ConfigError, match="from 2 to 16"):
        ButterflyMoE(16, 24, activation_bits=bits)
