"""Refit, bias and low-rank correction against least squares on the rows themselves, in double."""

import pytest
import torch

from lightning_bfmoe.calibrate import Moments, refit_output
from lightning_bfmoe.calibrate.refit import RIDGES, best_bias, choose_refit


@pytest.fixture
def rows():
    h = torch.randn(300, 12).double() @ torch.randn(12, 12).double() + 2
    y = h @ torch.randn(12, 5).double() + torch.randn(300, 5).double() + 1
    return h, y


def moments_of(h, y):
    moments = Moments(h.shape[1], y.shape[1])
    for part, target in zip(h.split(37), y.split(37), strict=True):
        moments.update(part, target)
    return moments


@pytest.mark.parametrize("ridge", [0.0, 3e-3, 0.5])
def test_the_refit_is_the_ridge_regression_towards_w(rows, ridge):
    h, y = rows
    weight = torch.randn(5, 12).double()
    centred, target = h - h.mean(0), y - y.mean(0)
    level = ridge * centred.square().mean()  # mean of the diagonal of C
    above = torch.cat([centred / 300**0.5, level**0.5 * torch.eye(12).double()])
    right = torch.cat([target / 300**0.5, level**0.5 * weight.T])
    wanted = torch.linalg.lstsq(above, right).solution.T
    torch.testing.assert_close(refit_output(weight, moments_of(h, y), ridge), wanted)


def test_the_bias_makes_the_mean_right(rows):
    h, y = rows
    weight = torch.randn(5, 12).double()
    bias = best_bias(weight, moments_of(h, y))
    torch.testing.assert_close((h @ weight.T + bias).mean(0), y.mean(0))


def test_dead_units_keep_their_column(rows):
    h, y = rows
    h[:, 4] = 0.0
    weight = torch.randn(5, 12).double()
    found = refit_output(weight, moments_of(h, y), 0.0)
    assert torch.equal(found[:, 4], weight[:, 4])
    live = [j for j in range(12) if j != 4]
    centred = h[:, live] - h[:, live].mean(0)
    wanted = torch.linalg.lstsq(centred, y - y.mean(0)).solution.T
    torch.testing.assert_close(found[:, live], wanted)


def test_units_that_all_are_dead_keep_the_matrix(rows):
    weight = torch.randn(5, 12).double()
    found = refit_output(weight, moments_of(torch.zeros(300, 12).double(), rows[1]), 3e-3)
    assert torch.equal(found, weight)


def test_a_singular_moment_is_solved_too(rows):
    h, y = rows
    h = torch.cat([h, h], dim=1)  # rank 12 of 24
    found = refit_output(torch.zeros(5, 24), moments_of(h, y), 0.0)
    miss = y - h @ found.T - best_bias(found, moments_of(h, y))
    centred = h[:, :12] - h[:, :12].mean(0)
    target = y - y.mean(0)
    wanted = target - centred @ torch.linalg.lstsq(centred, target).solution
    torch.testing.assert_close(miss.square().sum(), wanted.square().sum())


def test_held_out_rows_choose_the_ridge():
    truth = torch.randn(4, 30).double()
    h, other = torch.randn(32, 30).double(), torch.randn(500, 30).double()
    y = h @ truth.T + 3 * torch.randn(32, 4).double()  # few rows and much noise
    fit, held = moments_of(h, y), moments_of(other, other @ truth.T)
    kept, ridge = choose_refit(truth, fit, held)
    assert ridge is None
    assert torch.equal(kept, truth)
    found, ridge = choose_refit(torch.zeros(4, 30), fit, held)
    assert ridge is not None
    errors = {
        r: held.output_error(w, best_bias(w, fit))
        for r in RIDGES
        for w in [refit_output(torch.zeros(4, 30), fit, r)]
    }
    assert ridge == min(errors, key=errors.get)
