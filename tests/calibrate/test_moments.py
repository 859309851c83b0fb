"""Streaming moments equal those of all rows at once, in double."""

import pytest
import torch

from lightning_bfmoe.calibrate import Moments
from lightning_bfmoe.errors import CalibrationError


def stream(x, y=None, sizes=(3, 40, 1, 16), **kwargs):
    moments = Moments(x.shape[1], 0 if y is None else y.shape[1], **kwargs)
    targets = [None] * len(sizes) if y is None else y.split(sizes)
    for part, target in zip(x.split(sizes), targets, strict=True):
        moments.update(part, target)
    return moments


def test_they_equal_the_moments_of_all_rows():
    x, y = torch.randn(60, 5).double() + 3, torch.randn(60, 2).double()
    m = stream(x, y)
    centred, target = x - x.mean(0), y - y.mean(0)
    assert m.count == 60
    torch.testing.assert_close(m.mean, x.mean(0))
    torch.testing.assert_close(m.target_mean, y.mean(0))
    torch.testing.assert_close(m.covariance(), centred.T @ centred / 60)
    torch.testing.assert_close(m.second(), x.T @ x / 60)
    torch.testing.assert_close(m.cross(), target.T @ centred / 60)
    torch.testing.assert_close(m.target_variance(), target.square().mean(0))


def test_a_large_offset_costs_no_digits():
    x = torch.randn(60, 4).double()
    far = (x + 1e4).float()  # naive E[x^2] - E[x]^2 in float32 keeps no digit here
    wanted = torch.cov(far.double().T, correction=0)
    torch.testing.assert_close(stream(far).covariance(), wanted, rtol=1e-5, atol=1e-5)


def test_many_batches_do_not_drift():
    x = torch.randn(20_000, 2)
    moments = Moments(2)
    for part in x.split(10):
        moments.update(part)
    wanted = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moments.covariance(), wanted, rtol=1e-6, atol=1e-7)


def test_the_error_of_a_map_needs_no_rows():
    x, y = torch.randn(60, 5).double(), torch.randn(60, 2).double()
    weight, bias = torch.randn(2, 5).double(), torch.randn(2).double()
    miss = (y - x @ weight.T - bias).square().sum()
    wanted = float(miss / (y - y.mean(0)).square().sum())
    assert stream(x, y).output_error(weight, bias) == pytest.approx(wanted, rel=1e-12)


def test_a_constant_target_is_met_or_missed():
    m = stream(torch.randn(60, 2).double(), torch.ones(60, 1).double())
    assert m.output_error(torch.zeros(1, 2), torch.ones(1)) == 0
    assert m.output_error(torch.zeros(1, 2), torch.zeros(1)) == float("inf")


def test_nothing_is_kept_but_moments():
    m = stream(torch.randn(60, 5))
    sizes = [v.numel() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert sum(sizes) == 5 + 5 * 5


def test_bfloat16_rows_are_widened():
    x = torch.randn(60, 3).bfloat16()
    wanted = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(stream(x).covariance(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    x = torch.zeros(4, 2)
    x[1, 1] = bad
    with pytest.raises(CalibrationError, match=r"1 NaN or infinite of 8 in the input of layers.3"):
        Moments(2, name="layers.3").update(x)


def test_units_that_never_move_are_counted():
    x = torch.randn(20, 3)
    x[:, 1] = 7.0
    assert stream(x, sizes=(10, 10)).dead() == 1
