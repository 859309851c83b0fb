"""Experts that are kept are bit-equal, and all that has a row per expert follows."""

import copy

import pytest
import torch
from torch import nn

from lightning_bfmoe import Calibration, load_packed, pack
from lightning_bfmoe.calibrate.experts import prune_experts, removal_course
from lightning_bfmoe.errors import CalibrationError, ConfigError
from lightning_bfmoe.functional.routing import route_top_k
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.pruning import keep_experts_, packed_bytes
from lightning_bfmoe.swap.report import layer_sizes

KEPT = [5, 0, 3]


def make(seed=0, **settings):
    options = {"num_experts": 6, "top_k": 2, "gated": True, "gains": True, **settings}
    layer = ButterflyMoE(12, 20, **options, seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.router.weight.mul_(10)
        layer.router.balance_bias.copy_(torch.linspace(-0.2, 0.2, options["num_experts"]))
        for linear in layer.experts.linears().values():
            if linear.gain_in is not None:
                linear.gain_in.uniform_(0.5, 2, generator=draw)
                linear.gain_out.uniform_(0.5, 2, generator=draw)
    return layer


def rows(count=64, seed=3):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("down", ["butterfly", "dense"])
def test_kept_experts_are_bit_equal(down):
    whole, x = make(down=down), rows()
    small = keep_experts_(copy.deepcopy(whole), KEPT)
    for new, old in enumerate(KEPT):
        assert torch.equal(small.experts[new](x), whole.experts[old](x))
        assert torch.equal(small.router.weight[new], whole.router.weight[old])
        assert torch.equal(small.router.balance_bias[new], whole.router.balance_bias[old])
    for role, linear in small.experts.linears().items():
        other = whole.experts.linears()[role]
        assert torch.equal(linear.substrate.latent, other.substrate.latent)
        for name in ("gain_in", "gain_out"):
            assert torch.equal(getattr(linear, name), getattr(other, name)[KEPT])
    assert small.experts.num_experts == len(small.experts) == 3


def test_tokens_whose_experts_are_kept_come_out_the_same():
    whole, x = make(), rows(400)
    chosen = route_top_k(x @ whole.router.weight.T, 2, whole.router.balance_bias).experts
    inside = torch.isin(chosen, torch.tensor(KEPT)).all(dim=1)
    assert 10 < int(inside.sum()) < 390
    small = keep_experts_(copy.deepcopy(whole), KEPT)
    torch.testing.assert_close(small(x)[inside], whole(x)[inside], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(small(x)[~inside], whole(x)[~inside])


def test_it_trains_and_is_rebuilt_from_its_state(tmp_path):
    layer = keep_experts_(make(), KEPT).train()
    layer(rows()).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.router.update_balance()
    twin = ButterflyMoE.from_settings(layer.settings)
    twin.load_state_dict(layer.state_dict())
    layer.eval()
    assert torch.equal(twin.eval()(rows()), layer(rows()))
    model = nn.Sequential(layer)
    pack(model, tmp_path / "m.bfmoe", angles="fp32")
    loaded = load_packed(
        tmp_path / "m.bfmoe", nn.Sequential(ButterflyMoE.from_settings(layer.settings))
    )
    torch.testing.assert_close(loaded(rows()), layer(rows()))


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("down", ["butterfly", "dense"])
def test_bytes_are_those_of_the_report(gains, down):
    layer = make(gains=gains, down=down)
    for count in (2, 6):
        wanted = layer_sizes({**layer.settings, "num_experts": count}, router=True)[1]
        assert packed_bytes(layer, count) == wanted


@pytest.mark.parametrize(
    ("kept", "match"),
    [([0, 6], "different ones of 0 to 5"), ([1, 1], "each expert once"), ([2], "at least top_k=2")],
)
def test_wrong_experts_are_refused(kept, match):
    with pytest.raises(ConfigError, match=match):
        keep_experts_(make(), kept)


def test_a_packed_layer_is_refused(tmp_path):
    model = nn.Sequential(make())
    pack(model, tmp_path / "m.bfmoe")
    load_packed(tmp_path / "m.bfmoe", model)
    with pytest.raises(ConfigError, match="Prune the trained model, then pack it"):
        keep_experts_(model[0], KEPT)


def test_the_course_removes_what_changes_least():
    layer, x = make(), rows(300)
    course = removal_course(layer, x, 2)
    assert [len(kept) for kept, _ in course] == [6, 5, 4, 3, 2]
    wanted = layer(x).double()
    for kept, error in course:
        small = keep_experts_(copy.deepcopy(layer), kept)
        brute = (small(x).double() - wanted).square().sum() / wanted.square().sum()
        assert error == pytest.approx(float(brute), rel=1e-4, abs=1e-12)
    singles = {}
    for i in range(6):  # the first one to go is the best single one
        small = keep_experts_(copy.deepcopy(layer), [j for j in range(6) if j != i])
        singles[i] = float((small(x).double() - wanted).square().sum())
    assert course[1][0] == [j for j in range(6) if j != min(singles, key=singles.get)]
    assert torch.equal(layer.router.balance_bias, make().router.balance_bias)


def test_twins_are_not_both_dropped():
    layer = make(num_experts=4, top_k=1)
    with torch.no_grad():
        for owner, name in [(layer.router, "weight"), (layer.router, "balance_bias")]:
            getattr(owner, name)[1] = getattr(owner, name)[0]
        for linear in layer.experts.linears().values():
            for tensor in (
                linear.rotate_in.angles,
                linear.rotate_out.angles,
                linear.gain_in,
                linear.gain_out,
            ):
                tensor[1] = tensor[0]
    kept, error = removal_course(layer, rows(300), 3)[1]
    assert len({0, 1} & set(kept)) == 1 and error < 1e-12
    assert removal_course(layer, rows(300), 2)[2][1] > 1e-3


def two_layers():
    return nn.Sequential(make(0), make(1, num_experts=7, top_k=1), make(2))


def batches():
    return [rows(32, seed=i) for i in range(4)]


def test_a_budget_holds_and_is_spent_where_it_helps():
    size = sum(packed_bytes(m, m.router.num_experts) for m in two_layers())
    errors = []
    for share in (0.8, 1.0):
        model = two_layers()
        report = prune_experts(model, batches(), budget=int(share * size))
        after = sum(packed_bytes(m, m.router.num_experts) for m in model)
        assert after == sum(row.size_after for row in report.layers) <= share * size
        assert [m.router.num_experts for m in model] == [len(r.kept) for r in report.layers]
        errors.append(sum(row.error for row in report.layers))
    assert errors[0] > errors[1] == 0
    assert "Experts kept" in str(report)


def test_a_count_is_kept_everywhere():
    model = two_layers()
    report = prune_experts(model, batches(), keep=4, calibration=Calibration(max_batches=4))
    assert [m.router.num_experts for m in model] == [4, 4, 4]
    assert [row.experts for row in report.layers] == [6, 7, 6]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "to a budget or to a count"),
        ({"keep": 1}, "keep lies between top_k=2"),
        ({"keep": 7}, "and the 6 experts of '0'"),
        ({"budget": "1B"}, "at the least"),
    ],
)
def test_what_cannot_be_pruned_is_left_as_it_was(settings, match):
    model = two_layers()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ConfigError, CalibrationError), match=match):
        prune_experts(model, batches(), **settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_experts_without_a_router_of_ours_are_refused():
    with pytest.raises(CalibrationError, match="a router of their own: got none"):
        prune_experts(nn.Sequential(ButterflyExperts(12, 20)), batches(), keep=2)
