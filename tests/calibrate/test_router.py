"""Spherical k-means and the router made of it."""

import pytest
import torch

from lightning_bfmoe.calibrate import router_weight, spherical_centroids
from lightning_bfmoe.errors import CalibrationError


def groups(count=4, each=50, d=16, noise=0.05):
    centres = torch.nn.functional.normalize(torch.randn(count, d), dim=1)
    rows = centres.repeat_interleave(each, dim=0) + noise * torch.randn(count * each, d)
    return rows * (0.5 + 2 * torch.rand(count * each, 1)), centres


def test_groups_are_found():
    rows, centres = groups()
    found, member = spherical_centroids(rows, 4)
    assert len({tuple(part.unique().tolist()) for part in member.split(50)}) == 4
    assert (found @ centres.T).amax(dim=0).min() > 0.98


def test_each_step_is_lloyds():
    rows, _ = groups(noise=0.4)
    found, member = spherical_centroids(rows, 3, steps=200)
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert torch.equal(member, (unit @ found.T).argmax(dim=1))
    for i in range(3):
        mean = torch.nn.functional.normalize(unit[member == i].sum(0), dim=0)
        torch.testing.assert_close(found[i], mean, rtol=1e-4, atol=1e-5)


def test_no_cluster_stays_empty():
    rows = torch.cat([torch.ones(30, 4), torch.eye(4)[:1]]) + 1e-3 * torch.randn(31, 4)
    _, member = spherical_centroids(rows, 3)
    assert len(member.unique()) == 3


def test_equal_rows_are_no_error(rng_untouched):
    found, member = spherical_centroids(torch.ones(5, 3), 3)
    assert torch.isfinite(found).all()
    assert member.shape == (5,)


def test_the_router_follows_the_clusters():
    rows, _ = groups()
    weight = router_weight(rows, 4)
    logits = rows @ weight.T
    assert [len(part.unique()) for part in logits.argmax(1).split(50)] == [1] * 4
    assert logits.argmax(1)[::50].unique().numel() == 4
    assert float(logits.std(dim=1).mean()) == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(weight.sum(0), torch.zeros(16), rtol=0, atol=1e-4)


def test_too_few_tokens_are_refused():
    with pytest.raises(CalibrationError, match="2 tokens for 4 clusters"):
        spherical_centroids(torch.randn(2, 3), 4)
