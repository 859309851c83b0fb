"""Mixture-of-experts models: the router stays, the experts become rotations of one matrix."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, set_blend
from lightning_bfmoe.swap import apply_swap_plan, find_feed_forward, restore, swap_feed_forward
from lightning_bfmoe.swap.fit import fit_experts, weight_error
from lightning_bfmoe.swap.probe import probe_block
from tests.swap.zoo import Expert, ListMoE, Plain, mixtral, relative, run, state

IDS = torch.arange(14).reshape(2, 7)


def equal_experts(model):
    """Makes all experts of each layer the same, as after upcycling a dense model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ListMoE):
                for expert in module.experts[1:]:
                    expert.load_state_dict(module.experts[0].state_dict())
            for p in module.parameters(recurse=False):
                if p.dim() == 3:
                    p.copy_(p[:1].expand_as(p))
    return model.eval()


MODELS = {"mixtral": mixtral, "list": lambda: Plain(ListMoE())}


@pytest.mark.parametrize("name", MODELS)
def test_equal_experts_are_preserved_and_restored(name):
    torch.manual_seed(0)
    model = equal_experts(MODELS[name]())
    before, wanted = state(model), run(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # equal experts do fit, so there is nothing to warn of
        report = swap_feed_forward(model, angle_std=0.0, num_experts=64)
    assert {(b.num_experts, b.own_router) for b in report.blocks} == {(4, True)}
    assert max(b.expert_error for b in report.blocks) < 1e-5
    assert relative(run(model, IDS), wanted) > 1e-3
    set_blend(model, 0.0)
    assert relative(run(model, IDS), wanted) < 1e-5
    restore(model, report)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(run(model, IDS), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_different_experts_warn_with_their_error(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with pytest.warns(
        UserWarning, match=r"4 independent experts do not fit .* is \d\d% after taking their mean"
    ):
        report = swap_feed_forward(model, angle_std=0.0)
    # independent matrices: what is left is sqrt(1 - 1 / experts) of them
    assert report.blocks[0].expert_error == pytest.approx(0.75**0.5, abs=0.03)
    model.train()
    run(model, IDS).square().mean().backward()
    swapped = [m for m in model.modules() if isinstance(m, ButterflyExperts)]
    assert all(bool((p.grad != 0).any()) for m in swapped for p in m.parameters())
    assert not any(isinstance(m, ButterflyMoE) for m in model.modules())


def test_fitting_lowers_the_error_and_says_so():
    errors = []
    for steps in (0, 40):
        torch.manual_seed(0)
        model = Plain(ListMoE())
        with pytest.warns(UserWarning, match=f"after {steps or 'taking'}"):
            report = swap_feed_forward(model, gains=True, fit_steps=steps, angle_std=0.02)
        errors.append(report.blocks[0].expert_error)
        assert model.mlp.experts.blend == 1.0
        assert all(p.grad is None for p in model.parameters())
    assert errors[1] < 0.9 * errors[0]


def test_the_history_of_a_fit_starts_at_the_measured_error():
    torch.manual_seed(0)
    experts = [probe_block(Expert()) for _ in range(3)]
    layer = ButterflyExperts(16, 24, 3, gated=True, bias=False, angle_std=0.1, gains=True)
    before = weight_error(layer, experts)
    history = fit_experts(layer, experts, 5)
    assert history[0] == pytest.approx(before, rel=1e-5)
    assert weight_error(layer, experts) < history[-1] < before


def test_the_router_is_the_very_same():
    model = mixtral()
    gates = [layer.mlp.gate for layer in model.model.layers]
    with pytest.warns(UserWarning, match="do not fit"):
        swap_feed_forward(model)
    assert all(
        layer.mlp.gate is gate for layer, gate in zip(model.model.layers, gates, strict=True)
    )
    assert type(model.model.layers[0].mlp.experts) is ButterflyExperts


def test_an_expert_list_is_indexed_like_the_module_list():
    torch.manual_seed(0)
    model = equal_experts(Plain(ListMoE()))
    expert = model.mlp.experts[0]
    swap_feed_forward(model, angle_std=0.0)
    experts = model.mlp.experts
    set_blend(model, 0.0)
    x = torch.randn(2, 3, 16)
    assert isinstance(experts, ButterflyExperts)
    assert (len(experts), len(list(experts))) == (4, 4)
    assert relative(experts[-1](x), expert(x)) < 1e-5
    assert experts[1](x[:0]).shape == (0, 3, 16)
    with pytest.raises(IndexError, match="out of range"):
        experts[4]
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_a_list_without_a_router_is_a_stack_of_layers():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlps = nn.ModuleList([Expert() for _ in range(4)])

    found = find_feed_forward(Stack())
    assert [(c.path, c.family) for c in found] == [(f"mlps.{i}", "structure") for i in range(4)]


def test_other_forms_of_stacked_experts():
    class Transposed(nn.Module):
        def __init__(self, count=3, d=16, f=24):
            super().__init__()
            self.up_gate = nn.Parameter(torch.randn(count, d, 2 * f) / 4)
            self.up_gate_bias = nn.Parameter(torch.randn(count, 2 * f))
            self.down = nn.Parameter(torch.randn(count, f, d) / 5)
            self.gelu = True

        def forward(self, x, chosen, weights):
            out = torch.zeros_like(x)
            for e in range(self.down.shape[0]):
                token, k = torch.where(chosen == e)
                up, gate = (x[token] @ self.up_gate[e] + self.up_gate_bias[e]).chunk(2, dim=-1)
                y = (nn.functional.gelu(gate) * up) @ self.down[e]
                out.index_add_(0, token, y * weights[token, k, None])
            return out

    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Transposed()})
    found = find_feed_forward(model)[0]
    assert (found.status, found.shape, found.block.activation) == (
        "ready",
        "3 x 16 -> 24 -> 16",
        "gelu",
    )
    x, chosen = torch.randn(5, 16), torch.tensor([[1, 1]] * 5)
    one = found.experts[1](x)
    assert relative(model["experts"](x, chosen, torch.full((5, 2), 0.5)), one) < 1e-5


def test_experts_of_another_kind_are_refused_with_a_reason():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(3, *s)) for s in ((24, 16), (16, 24)))

        def forward(self, x, chosen, weights):
            return x + self.down[0] @ self.up[0] @ x.mT if x.dim() > 2 else x

    found = find_feed_forward(nn.ModuleDict({"experts": Clamped()}))[0]
    assert found.reason == "no activation and gating that is known reproduces its output"

    class NoArguments(Clamped):
        def forward(self):
            return None

    found = find_feed_forward(nn.ModuleDict({"experts": NoArguments()}))[0]
    assert "raises TypeError" in found.reason


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_rebuilds_the_experts(name):
    torch.manual_seed(0)
    model = equal_experts(MODELS[name]())
    report = swap_feed_forward(model)
    torch.manual_seed(1)
    fresh = MODELS[name]().eval()
    apply_swap_plan(fresh, report.plan())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, IDS), run(model, IDS))


def test_nan_in_an_expert_is_an_error():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(SwapError, match=r"layers\.1\.mlp\.experts': down_proj holds 1 NaN"):
        swap_feed_forward(model)
