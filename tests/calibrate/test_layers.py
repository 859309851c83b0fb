"""What calibration writes into a layer: bases that preserve, grids that stay, centring biases."""

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe.calibrate import Dense, Moments, Recipe, fit_inputs_, fit_output_, place_orbit_
from lightning_bfmoe.calibrate.feed_forward import check_settings, degraded_hidden
from lightning_bfmoe.calibrate.matrix import input_judge
from lightning_bfmoe.calibrate.orbit import BASES, base_angles, centre_weight, moment_in_basis
from lightning_bfmoe.calibrate.park import Parked
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import CalibrationError
from lightning_bfmoe.functional.butterfly import butterfly_matrix
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from tests.swap.zoo import relative

D, HIDDEN = 24, 40


def dense_block(gated, scale=1.0):
    up, down = scale * torch.randn(HIDDEN, D) / D**0.5, torch.randn(D, HIDDEN) / HIDDEN**0.5
    gate = torch.randn(HIDDEN, D) / D**0.5 if gated else None
    bias = torch.randn(HIDDEN) / 2

    def function(x):
        h = F.linear(x, up, bias)
        h = F.silu(h) if gate is None else F.silu(x @ gate.T) * h
        return h @ down.T

    return Dense(up=up, down=down, gate=gate, up_bias=bias, function=function)


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(9)) / D**0.5
    return torch.randn(count, D, generator=generator) @ mix * 2 + 0.3


def moments_of(x, y=None):
    moments = Moments(x.shape[1], 0 if y is None else y.shape[1])
    moments.update(x, y)
    return moments


def calibrated(gated, recipe=None, **settings):
    """A layer that was fitted to a block, the block, and the held-out error of its output."""
    recipe, dense = recipe or Recipe(), dense_block(gated)
    options = {"angle_std": 0.02, "activation": "silu", "gated": gated, **settings}
    layer = ButterflyMoE(D, HIDDEN, 4, **options)
    fit, held = tokens(600, 1), tokens(200, 2)
    choices = fit_inputs_(layer, dense, moments_of(fit), moments_of(held), recipe)
    hidden = degraded_hidden(layer)
    pairs = [moments_of(hidden(x), dense.function(x)) for x in (fit, held)]
    choices["down"], _ = fit_output_(layer, dense, *pairs, recipe)
    return layer, dense, choices


def error_of(layer, dense, x=None):
    x = tokens(300, 3) if x is None else x
    wanted = dense.function(x)
    miss = (layer.eval()(x).detach() - wanted).square().sum()
    return float(miss / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize("gated", [False, True])
def test_before_rounding_every_basis_preserves_the_function(basis, gated):
    dense = dense_block(gated)
    layer = ButterflyMoE(
        D, HIDDEN, 4, angle_std=0.0, activation="silu", gated=gated, seed=3
    ).double()
    for linear in layer.experts.linears().values():
        place_orbit_(linear.rotate_in, BASES[basis])
    tensors = {"up": dense.up, "down": dense.down, "gate": dense.gate, "up_bias": dense.up_bias}
    layer.load_dense_(**{k: v.double() for k, v in tensors.items() if v is not None})
    layer.set_blend(0.0)
    x = tokens(50, 1)
    assert relative(layer(x.double()), dense.function(x)) < 1e-6  # the block computes in float32


def test_the_base_is_the_mean_of_the_experts():
    layer = ButterflyExperts(D, HIDDEN, 5, angle_std=0.3)
    rotation = layer.up.rotate_in
    before = rotation.angles.detach().clone()
    place_orbit_(rotation, BASES["hadamard"])
    torch.testing.assert_close(
        rotation.angles.mean(0), base_angles(rotation, BASES["hadamard"]).float()
    )
    torch.testing.assert_close(rotation.angles[1] - rotation.angles[0], before[1] - before[0])
    place_orbit_(rotation, 0.0, noise=0.01)
    assert float(rotation.angles.detach().std()) == pytest.approx(0.01, rel=0.01)


def test_the_moment_of_rotated_inputs():
    angles = torch.rand(4, 5).double()
    x = torch.randn(70, 10).double()
    rotated = x @ butterfly_matrix(angles, 10)  # rows B^T x
    got = moment_in_basis(x.T @ x, angles)
    torch.testing.assert_close(got, rotated.T @ rotated)


def test_the_centre_is_what_one_expert_without_noise_computes():
    layer = ButterflyExperts(D, HIDDEN, 1, gains=True)
    layer.up.gain_in.data.uniform_(0.5, 2)
    torch.testing.assert_close(centre_weight(layer.up), layer.up.expert_weight(0).detach())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gains", [False, True])
def test_the_judge_and_the_layer_agree(gated, gains):
    # without noise all experts are the centre, so what was judged is what the layer computes
    layer, dense, choices = calibrated(gated, Recipe(noise=0.0), gains=gains)
    assert error_of(layer, dense, tokens(200, 2)) == pytest.approx(choices["down"].error, rel=1e-3)
    candidates = 4 if gains else 2
    assert all(len(choice.tried) == candidates for choice in choices.values())
    assert all(choice.error == min(choice.tried.values()) for choice in choices.values())


@pytest.mark.parametrize("gated", [False, True])
def test_it_is_much_nearer_than_the_naive_layer(gated):
    layer, dense, _ = calibrated(gated)
    naive = ButterflyMoE(D, HIDDEN, 4, angle_std=0.01, activation="silu", gated=gated)
    biases = {"up_bias": dense.up_bias}
    naive.load_dense_(dense.up, dense.down, dense.gate, **biases)
    assert error_of(layer, dense) < 0.6 * error_of(naive, dense)


@pytest.mark.parametrize("part", ["sweeps", "refit", "bases"])
def test_each_part_of_the_recipe_earns_its_place(part):
    less = {"sweeps": {"sweeps": 0}, "refit": {"refit": False}, "bases": {"bases": ("identity",)}}
    total = {}
    for name, recipe in (("all", Recipe()), ("less", Recipe(**less[part]))):
        errors = []
        for seed in range(4):
            torch.manual_seed(seed)
            errors.append(calibrated(True, recipe)[2]["down"].error)
        total[name] = sum(errors)
    assert total["all"] < total["less"]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_latents_lie_on_a_grid_that_stays(granularity):
    layer, _, _ = calibrated(True, granularity=granularity)
    x = tokens(20, 4)
    layer.eval().set_blend(1.0)
    ternary = layer(x)
    layer.set_blend(0.0)
    torch.testing.assert_close(layer(x), ternary, rtol=1e-5, atol=1e-5)
    for linear in layer.experts.linears().values():
        latent = linear.substrate.latent.detach()
        trits, _ = linear.substrate.ternary()
        assert torch.equal(trits, latent.sign().to(torch.int8))


def test_biases_take_the_mean_error():
    layer, dense, _ = calibrated(False, Recipe(noise=0.0))
    x = tokens(600, 1)
    got = F.linear(x, centre_weight(layer.experts.up), layer.experts.up.bias)
    torch.testing.assert_close(got.mean(0), F.linear(x, dense.up, dense.up_bias).mean(0))
    torch.testing.assert_close(layer(x).mean(0), dense.function(x).mean(0), rtol=1e-4, atol=1e-4)


def test_a_layer_without_biases_uses_uncentred_moments():
    layer, dense, _ = calibrated(False, Recipe(noise=0.0), bias=False)
    assert layer.experts.up.bias is None
    assert error_of(layer, Dense(dense.up, dense.down, dense.function)) < 1.0


def test_a_dense_output_matrix_is_refitted_and_not_rounded():
    layer, dense, choices = calibrated(True, Recipe(noise=0.0), down="dense")
    rounded = calibrated(True, Recipe(noise=0.0))[2]
    assert choices["down"].basis == "dense"
    assert choices["down"].error < rounded["down"].error
    assert error_of(layer, dense, tokens(200, 2)) == pytest.approx(choices["down"].error, rel=1e-3)


def test_noise_is_never_more_than_the_layer_was_drawn_with():
    layer, _, _ = calibrated(False, Recipe(noise=0.5), angle_std=0.003)
    spread = layer.experts.up.rotate_in.angles.detach()
    assert float((spread - spread.mean(0)).square().mean().sqrt()) < 0.004


def test_input_errors_are_those_of_the_rows():
    weight, other = torch.randn(6, D), torch.randn(6, D)
    fit, held = tokens(100, 1), tokens(50, 2)
    for bias in (False, True):
        judge = input_judge(weight, moments_of(fit), moments_of(held), bias)
        miss = (weight - other).double()
        shift = miss @ fit.double().mean(0) if bias else torch.zeros(6).double()
        wanted = (held.double() @ miss.T - shift).square().sum()
        wanted = float(wanted / (held.double() @ weight.double().T).square().sum())
        assert judge(other.double()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_a_parked_layer_comes_back_bit_for_bit(gated):
    layer, _, _ = calibrated(gated)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    parked = Parked(layer)
    assert sum(m.substrate.latent.numel() for m in layer.experts.linears().values()) == 0
    assert parked.unpark() is layer
    after = layer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p is parameters[k] for k, p in layer.named_parameters())


@pytest.mark.parametrize("change", [{"scale": "absmean"}, {"init": "scratch"}])
def test_settings_that_undo_a_calibration_are_refused(change):
    with pytest.raises(CalibrationError, match=r"scale=|init="):
        check_settings(ButterflyMoEConfig(**change))
