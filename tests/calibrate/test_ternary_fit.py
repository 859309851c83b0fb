"""GPTQ and coordinate descent against the same thing written down slowly, and the optimum."""

import itertools

import pytest
import torch

from lightning_bfmoe.calibrate import column_equalizer, descend_trits, gptq_ternary
from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.ternary import ternarize


def moment(d, rows=200, correlated=True):
    x = torch.randn(rows, d).double()
    if correlated:
        x = x @ torch.randn(d, d).double() + 0.5
    return x.T @ x / rows


def damp(h, share=0.01):
    return h + share * h.diagonal().mean() * torch.eye(len(h)).double()


def error(weight, trits, alpha, h):
    miss = weight - alpha * trits
    return ((miss @ h) * miss).sum(dim=1)


def slow_gptq(weight, h, alpha):
    """Optimal brain quantisation: after each column the inverse of what is left, from scratch."""
    h = damp(h)
    left = torch.argsort(h.diagonal(), descending=True, stable=True)
    w, trits = weight.clone(), torch.zeros_like(weight)
    while len(left):
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        trits[:, j] = (w[:, j] / alpha[:, 0]).round().clamp(-1, 1)
        miss = w[:, j] - alpha[:, 0] * trits[:, j]
        w[:, left] -= torch.outer(miss / inverse[0, 0], inverse[0])
        left = left[1:]
    return trits


@pytest.mark.parametrize("d_in", [7, 150])  # less and more than a block of columns
def test_gptq_is_optimal_brain_quantisation(d_in):
    weight, h = torch.randn(6, d_in).double(), moment(d_in, rows=2 * d_in)
    wanted = slow_gptq(weight, h, ternarize(weight)[1])
    trits, alpha = gptq_ternary(weight, h)
    assert (alpha > 0).all()  # else a row's trits would have turned with its scale
    assert torch.equal(trits, wanted.to(torch.int8))


def test_the_scale_is_the_best_for_its_trits():
    weight, h = torch.randn(6, 9).double(), moment(9)
    trits, alpha = gptq_ternary(weight, h)
    for change in (0.999, 1.001):
        assert (
            error(weight, trits, alpha, damp(h)) <= error(weight, trits, change * alpha, damp(h))
        ).all()


def test_one_scale_for_a_matrix():
    weight, h = torch.randn(6, 9).double(), moment(9)
    trits, alpha = gptq_ternary(weight, h, granularity="tensor")
    assert alpha.shape == (1, 1)
    best = error(weight, trits, alpha, damp(h)).sum()
    for change in (0.999, 1.001):
        assert best <= error(weight, trits, change * alpha, damp(h)).sum()


def test_white_inputs_need_no_more_than_least_squares():
    weight = torch.randn(5, 12).double()
    trits, alpha = gptq_ternary(weight, torch.eye(12).double())
    wanted, scale = ternarize(weight)
    assert torch.equal(trits, (weight / scale).round().clamp(-1, 1).to(torch.int8))
    assert torch.equal(trits, wanted)  # kept are the magnitudes above half a scale
    torch.testing.assert_close(alpha, scale)


def test_gptq_and_descent_come_near_the_optimum():
    weight, h = torch.randn(40, 6).double(), moment(6)
    all_trits = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6))).double()
    th = all_trits @ damp(h)
    gain = (th @ weight.T).square() / (th * all_trits).sum(1, keepdim=True).clamp(min=1e-12)
    optimum = ((weight @ damp(h)) * weight).sum(1) - gain.amax(0)  # over trits and scale
    nearest = error(weight, *ternarize(weight), damp(h)).sum()
    trits, alpha = gptq_ternary(weight, h)
    rounded = error(weight, trits, alpha, damp(h)).sum()
    descended = error(weight, *descend_trits(weight, trits, alpha, h), damp(h))
    assert (descended >= optimum - 1e-9).all()
    assert descended.sum() <= rounded < nearest
    assert descended.sum() - optimum.sum() < 0.5 * (nearest - optimum.sum())


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_descent_ends_where_no_single_trit_helps(granularity):
    weight, h = torch.randn(8, 140).double(), moment(140, rows=300)
    trits, alpha = gptq_ternary(weight, h, granularity=granularity)
    before = error(weight, trits, alpha, damp(h)).sum()
    trits, alpha = descend_trits(weight, trits, alpha, h, sweeps=200)
    best = error(weight, trits, alpha, damp(h))
    assert best.sum() <= before
    for j, value in itertools.product(range(140), (-1, 0, 1)):
        changed = trits.clone()
        changed[:, j] = value
        assert (error(weight, changed, alpha, damp(h)) >= best * (1 - 1e-12)).all()


def test_each_sweep_lowers_the_error():
    weight, h = torch.randn(8, 140).double(), moment(140, rows=300)
    trits, alpha = gptq_ternary(weight, h)
    errors = [
        error(weight, *descend_trits(weight, trits, alpha, h, sweeps=n), damp(h)).sum().item()
        for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_inputs_that_never_come_give_plain_least_squares():
    weight = torch.randn(3, 8).double()
    got = gptq_ternary(weight, torch.zeros(8, 8))
    for a, b in zip(got, ternarize(weight), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(descend_trits(weight, *got, torch.zeros(8, 8)), got, strict=True):
        assert torch.equal(a, b)


def test_a_moment_of_few_rows_is_enough():
    x = torch.randn(3, 20).double()
    trits, alpha = gptq_ternary(torch.randn(4, 20), x.T @ x / 3, damping=0.0)
    assert torch.isfinite(alpha).all()
    assert trits.abs().amax() == 1


def test_a_row_of_zeros_stays():
    weight = torch.randn(3, 8).double()
    weight[1] = 0
    trits, alpha = descend_trits(weight, *gptq_ternary(weight, moment(8)), moment(8))
    assert not (alpha * trits)[1].any()
    assert torch.isfinite(alpha).all()


def test_wrong_moments_are_refused():
    with pytest.raises(ShapeError, match=r"the second moment of 8 inputs is \(8, 8\)"):
        gptq_ternary(torch.randn(3, 8), torch.eye(7))
    with pytest.raises(ShapeError, match="the second moment of the inputs must hold finite"):
        gptq_ternary(torch.randn(3, 8), torch.full((8, 8), float("nan")))


def test_equalised_columns_have_one_norm():
    weight = torch.randn(5, 6).double() * torch.tensor([1.0, 30.0, 0.1, 1.0, 2.0, 0.0]).double()
    c = column_equalizer(weight)
    norms = (weight / c).norm(dim=0)
    torch.testing.assert_close(norms[:5], norms[:1].expand(5))
    assert norms[5] == 0
    assert c[5] == 1
    assert c[:5].log().sum().abs() < 1e-9
