"""Noise from a counter: normal, independent, and a function of its counter alone."""

import pytest
import scipy.stats
import torch

from lightning_bfmoe.functional import counter_noise


def noise(key, step, rows=20_000, columns=16):
    return counter_noise(torch.tensor([key, step]), rows, columns).double()


def test_it_is_normal_as_scipy_sees_it():
    values = [
        scipy.stats.kstest(noise(key, step).numpy().ravel(), "norm").pvalue
        for key in (0, 5, 2**31) for step in (0, 1, 10**6)
    ]  # fmt: skip
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    z = noise(3, 0)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert 4 < z.abs().max() < 5.4


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (noise(3, 0), noise(3, 1)),
        (noise(3, 0), noise(4, 0)),
        (noise(3, 0)[1:], noise(3, 0)[:-1]),
        (noise(3, 0)[:, 1:], noise(3, 0)[:, :-1]),
    ],
    ids=["steps", "keys", "rows", "columns"],
)
def test_neighbours_do_not_correlate(a, b):
    for f in (torch.Tensor.clone, torch.abs, torch.square):
        pair = torch.stack([f(a).flatten(), f(b).flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / pair.shape[1] ** 0.5


def test_no_generator_moves_and_a_part_equals_the_whole():
    before = torch.get_rng_state()
    whole = noise(1, 2, rows=9)
    assert torch.get_rng_state().equal(before)
    assert whole[:4].equal(noise(1, 2, rows=4)) and noise(1, 2, rows=0).shape == (0, 16)


def test_the_hash_is_lowbias32():
    from lightning_bfmoe.functional.noise import _mix

    def by_integers(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    numbers = [0, 1, 2**31, 2**32 - 1, 123456789]
    assert _mix(torch.tensor(numbers)).tolist() == [by_integers(x) for x in numbers]
