"""Bypasses, bounds and merged maps against the same least squares on the rows, in double."""

import pytest
import torch

from lightning_bfmoe.calibrate.bypass import (
    WeightedMoments,
    canonical_bound,
    fit_bypass,
    fit_on_basis,
    linear_error,
    linear_map,
    merged_map,
    shared_basis,
)
from lightning_bfmoe.errors import CalibrationError, ConfigError, ShapeError
from lightning_bfmoe.layers.bypass import LinearBypass, share_basis


def rows(seed=0, count=200, d=7, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    x = draw(count, d) @ draw(d, d) + 2
    y = torch.tanh(x) @ draw(d, d) + noise * draw(count, d) - 1
    return x, y, draw(count).square() + 0.1


def statistics(x, y, w):
    moments = WeightedMoments(x.shape[1], y.shape[1])
    for part in zip(x.split(33), y.split(33), w.split(33), strict=True):
        moments.update(*part)
    assert moments.count == len(x)
    return moments.statistics()


def centred(x, y, w):
    """Rows whose plain least squares is the weighted one with a constant."""
    share = (w / w.sum()).unsqueeze(1)
    return (x - (share * x).sum(0)) * share.sqrt(), (y - (share * y).sum(0)) * share.sqrt()


def loss(bypass, x, y, w):
    return float(((y - bypass(x)).square().sum(1) * w).sum() / w.sum())


def test_moments_are_the_weighted_ones():
    x, y, w = rows()
    s = statistics(x, y, w)
    a, b = centred(x, y, w)
    torch.testing.assert_close(s.mean_x, (w @ x) / w.sum())
    torch.testing.assert_close(s.mean_y, (w @ y) / w.sum())
    torch.testing.assert_close(s.c_xx, a.T @ a)
    torch.testing.assert_close(s.c_yx, b.T @ a)
    torch.testing.assert_close(s.c_yy, b.T @ b)
    assert s.mean_weight == pytest.approx(float(w.mean()))


def test_the_full_map_is_weighted_least_squares():
    x, y, w = rows()
    a, b = centred(x, y, w)
    wanted = torch.linalg.lstsq(a, b).solution.T
    torch.testing.assert_close(linear_map(statistics(x, y, w), 0.0), wanted)
    missed = (b - a @ wanted.T).square().sum() / b.square().sum()
    assert linear_error(statistics(x, y, w), 0.0) == pytest.approx(float(missed), rel=1e-9)
    full = fit_bypass(statistics(x, y, w), 7, 0.0)
    torch.testing.assert_close(full.left @ full.right, wanted)


def test_a_singular_input_is_solved_too():
    x, y, w = rows()
    x = torch.cat([x, x], dim=1)
    found = linear_map(statistics(x, y, w), 0.0)
    a, b = centred(x, y, w)
    wanted = torch.linalg.lstsq(a[:, :7], b).solution
    torch.testing.assert_close(a @ found.T, a[:, :7] @ wanted)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_low_rank_map_is_the_best_of_its_rank(rank):
    x, y, w = rows()
    s, (a, b) = statistics(x, y, w), centred(*rows())
    found = fit_bypass(s, rank, 0.0)
    # Eckart-Young in the whitened input: truncating the fitted values' singular values is optimal
    fitted = a @ torch.linalg.lstsq(a, b).solution
    u, v, t = torch.linalg.svd(fitted, full_matrices=False)
    best = (u[:, :rank] * v[:rank]) @ t[:rank]
    wanted = float((b - best).square().sum())
    assert loss(found, x, y, w) == pytest.approx(wanted, rel=1e-9)
    assert torch.linalg.matrix_rank(found.left @ found.right) == rank
    for seed in range(20):  # no small step away from it is better
        torch.manual_seed(seed)
        step = 1e-3 * torch.randn(7, rank).double()
        moved = type(found)(found.left + step, found.right, found.bias)
        assert loss(moved, x, y, w) > wanted


def test_rank_zero_is_the_weighted_mean():
    x, y, w = rows()
    found = fit_bypass(statistics(x, y, w), 0)
    torch.testing.assert_close(found(x), ((w @ y) / w.sum()).expand(200, -1))


def test_a_map_on_a_given_basis_is_least_squares():
    x, y, w = rows()
    basis = torch.randn(3, 7).double()
    a, b = centred(x, y, w)
    wanted = torch.linalg.lstsq(a @ basis.T, b).solution.T
    found = fit_on_basis(statistics(x, y, w), basis, 0.0)
    torch.testing.assert_close(found.left, wanted)
    mean = ((y - found(x)) * w.unsqueeze(1)).sum(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)


def test_a_shared_basis_is_the_best_where_inputs_are_alike():
    x, y, w = rows()
    others = [y, torch.sin(x) @ torch.randn(7, 7).double(), x.square() @ torch.randn(7, 7).double()]
    several = [statistics(x, o, w) for o in others]
    basis = shared_basis(several, 2, 0.0)
    total = sum(
        loss(fit_on_basis(s, basis, 0.0), x, o, w) for s, o in zip(several, others, strict=True)
    )
    stacked = torch.cat(others, dim=1)  # one regression onto all outputs has the same optimum
    wanted = loss(fit_bypass(statistics(x, stacked, w), 2, 0.0), x, stacked, w)
    assert total == pytest.approx(wanted, rel=1e-9)
    own = sum(loss(fit_bypass(s, 2, 0.0), x, o, w) for s, o in zip(several, others, strict=True))
    assert own < total


def test_the_canonical_bound_is_met_by_brute_force():
    x, y, w = rows()
    a, b = centred(x, y, w)
    plus = a + b
    qx, qy = torch.linalg.qr(a).Q, torch.linalg.qr(plus).Q
    rho = torch.linalg.svdvals(qx.T @ qy)  # canonical correlations, without any covariance
    wanted = float((1 - rho.square()).sum())
    s = statistics(x, y, w)
    assert canonical_bound(s, 0.0) == pytest.approx(wanted, rel=1e-6)
    error = float((b - a @ linear_map(s, 0.0).T).square().sum())
    assert error <= wanted * float(plus.square().sum()) * (1 + 1e-9)


def test_a_merged_map_is_least_squares_on_outputs():
    hidden, down = torch.randn(90, 11).double(), torch.randn(5, 11).double()
    m = hidden @ down.T
    target = torch.randn(90, 5).double() + m
    a = torch.linalg.lstsq(m, target).solution
    found = merged_map(down, m.T @ m / 90, target.T @ m / 90, 0.0)
    torch.testing.assert_close(hidden @ found.T, m @ a)


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(CalibrationError, match="lies in 0 to 7"):
        fit_bypass(statistics(*rows()), 8)
    with pytest.raises(ConfigError, match="lies in 0 to 4"):
        LinearBypass(4, 9, rank=5)


def test_the_layer_computes_the_map():
    x, y, w = rows()
    found = fit_bypass(statistics(x, y, w), 3)
    layer = LinearBypass(7, 7, 3).double()
    with torch.no_grad():
        layer.basis.copy_(found.right)
        layer.weight.copy_(found.left)
        layer.bias.copy_(found.bias)
    torch.testing.assert_close(layer(x), found(x))
    torch.testing.assert_close(layer(x.view(4, 50, 7)).view(200, 7), found(x))
    with pytest.raises(ShapeError, match=r"tokens of width 7: got \(2, 6\)"):
        layer(torch.zeros(2, 6).double())
    with pytest.raises(ShapeError, match="got no tensor"):
        layer(None)


def test_a_bypass_answers_like_attention():
    layer = LinearBypass(4, 4, 0, outputs=3)
    layer.bias.data.fill_(2.0)
    y, *others = layer(hidden_states=torch.zeros(2, 5, 4), attention_mask=None)
    assert others == [None, None] and (y == 2).all() and y.shape == (2, 5, 4)


def test_groups_share_one_parameter():
    layers = [LinearBypass(4, 4, 2, group=g) for g in ("a", "a", None, "b")]
    share_basis(layers)
    assert layers[0].basis is layers[1].basis
    assert len({id(layer.basis) for layer in layers}) == 3
