"""The receipt: table, plain data, sizes; restoring with it; repeating the swap from its plan."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.functional import packed_size
from lightning_bfmoe.layers import ButterflyMoE, moe_layers
from lightning_bfmoe.swap import (
    apply_swap_plan,
    find_feed_forward,
    plan_from_state_dict,
    restore,
    swap_feed_forward,
)
from lightning_bfmoe.swap.report import layer_sizes
from tests.swap.zoo import ZOO, Plain, TimmMlp, TorchStack, WithParameter, make, run


def test_the_table_can_be_read():
    model, _ = make("gpt2")
    text = str(swap_feed_forward(model, include="*.0.mlp", dry_run=True))
    assert "dry run: nothing was changed" in text
    assert "transformer.h.0.mlp" in text
    assert "32>128>32 gelu_tanh" in text
    assert "left alone (ready): transformer.h.1.mlp" in " ".join(text.split())
    assert "1 blocks" in text
    assert max(map(len, text.splitlines())) <= 100


def test_to_dict_is_json_and_adds_up():
    model, _ = make("llama")
    report = swap_feed_forward(model)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["totals"]["bytes_before"] == 2 * 3 * 32 * 48 * 4
    assert data["totals"]["parameters_before"] == 2 * 3 * 32 * 48
    assert data["blocks"][0]["gated"] is True
    json.dumps(report.plan())


def test_packed_bytes_by_hand():
    model = Plain(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)))
    report = swap_feed_forward(model, num_experts=4)
    trits, scales, biases = 2 * packed_size(16 * 64), 4 * 80, 4 * 80
    angles = 2 * (4 * (8 * 4 + 32 * 6)) * 2  # two matrices; stages x pairs of both sides; two bytes
    router = 4 * (4 * 16 + 4)
    assert report.blocks[0].packed_bytes == trits + scales + biases + angles + router


@pytest.mark.parametrize(
    "changes", [{}, {"gains": True, "gated": True}, {"down": "dense"}, {"stages": 2, "bias": False}]
)
def test_layer_sizes_count_the_real_parameters(changes):
    layer = ButterflyMoE(12, 20, 3, **changes)
    parameters, _ = layer_sizes(layer.settings, router=True)
    assert parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    "how", ["none", "dry", "twice", "released", "pickled", "copied", "foreign", "moved"]
)
def test_restore_says_what_it_lacks(how):
    model = Plain(TimmMlp())
    report = swap_feed_forward(model, dry_run=how == "dry")
    target, match = model, "must hold the original modules"
    if how == "none":
        report, match = None, "restore needs the report"
    elif how == "twice":
        restore(model, report)
    elif how == "released":
        report.release()
    elif how == "pickled":
        report = pickle.loads(pickle.dumps(report))
    elif how == "copied":
        report = copy.deepcopy(report)
    elif how == "foreign":
        target, match = copy.deepcopy(model), "the model that was swapped, its layers in place"
    elif how == "moved":
        model.mlp, match = nn.Identity(), "slot 'mlp' of a Plain without the report's layer"
    with pytest.raises(SwapError, match=match):
        restore(target, report)


def test_restore_through_a_wrapper_follows_mode():
    model = Plain(TimmMlp()).train()
    block = model.mlp
    report = swap_feed_forward(model)
    wrapper = nn.ModuleDict({"inner": model}).eval()
    restore(wrapper, report)
    assert model.mlp is block
    assert not any(m.training for m in block.modules())


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_repeats_the_surgery_on_a_fresh_model(name):
    model, ids = make(name)
    report = swap_feed_forward(model, num_experts=4, gains=True)
    plan = json.loads(json.dumps(report.plan()))
    assert plan_from_state_dict(model.state_dict()) == plan
    fresh, _ = make(name, seed=1)
    before = torch.get_rng_state()
    again = apply_swap_plan(fresh, plan)
    assert torch.equal(before, torch.get_rng_state())
    assert fresh.load_state_dict(model.state_dict()) is not None
    assert torch.equal(run(fresh, ids), run(model, ids))
    assert again.plan() == plan
    for (_, old), (_, new) in zip(moe_layers(model), moe_layers(fresh), strict=True):
        assert len(old._forward_hooks) == len(new._forward_hooks)
        assert (old.settings, old.placement) == (new.settings, new.placement)
    assert len(apply_swap_plan(fresh, plan)) == 0
    restore(fresh, again)
    assert list(moe_layers(fresh)) == []


def test_a_plan_is_read_from_a_state_with_another_root():
    model = TorchStack()
    outer = nn.ModuleDict({"net": model})
    inner = swap_feed_forward(model).plan()
    found = plan_from_state_dict(outer.state_dict())
    assert [e["path"] for e in found["replacements"]] == [
        f"net.{e['path']}" for e in inner["replacements"]
    ]
    fresh = nn.ModuleDict({"net": TorchStack()})
    apply_swap_plan(fresh, found)
    assert fresh["net"].encoder.use_nested_tensor is False


def test_a_plan_works_on_frozen_meta_and_shared_originals():
    block = TimmMlp()
    model = nn.ModuleDict({"a": block, "b": block})
    plan = swap_feed_forward(model).plan()
    assert plan_from_state_dict(model.state_dict()) == plan
    other = TimmMlp().requires_grad_(False)
    fresh = nn.ModuleDict({"a": other, "b": other}).to("meta")
    apply_swap_plan(fresh, plan)
    assert fresh["a"] is fresh["b"]
    assert {p.device.type for p in fresh.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in fresh.parameters())


def test_an_unnamed_activation_is_taken_from_the_fresh_model():
    model = Plain(WithParameter())
    plan = swap_feed_forward(model).plan()
    fresh = Plain(WithParameter())
    with torch.no_grad():
        fresh.mlp.act.weight.fill_(0.7)
    act = fresh.mlp.act
    apply_swap_plan(fresh, plan)
    copied = fresh.mlp.experts.activation.function
    assert copied is not act
    assert float(copied.weight.detach()) == pytest.approx(0.7)


def _plan(**changes):
    plan = swap_feed_forward(Plain(TimmMlp())).plan()
    plan["replacements"][0].update(changes)
    return plan


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (None, "a swap plan has version 1: got 'NoneType'"),
        ({"version": 9}, "a swap plan has version 1: got 9"),
        (_plan(path="nowhere"), "every slot of a placement must exist"),
        (_plan(layer={"kind": "Linear", "settings": {}}), "names one of the layers"),
        (
            _plan(layer={"kind": "ButterflyMoE", "settings": {"d_model": 16}}),
            "must be those of its layer",
        ),
        (
            _plan(layer={"kind": "ButterflyMoE", "settings": {"d_model": 1, "d_ff": 4}}),
            "must be an integer >= 2",
        ),
        (_plan(color="red"), "only known fields"),
    ],
)
def test_bad_plans_change_nothing(plan, match):
    model = Plain(TimmMlp())
    before = list(model.named_modules())
    with pytest.raises(SwapError, match=match):
        apply_swap_plan(model, plan)
    assert list(model.named_modules()) == before


def test_a_plan_does_not_overwrite_another_layer():
    model = Plain(TimmMlp())
    swap_feed_forward(model, num_experts=3)
    with pytest.raises(SwapError, match="must hold the planned layer"):
        apply_swap_plan(model, _plan())


def test_layers_built_by_hand_are_no_candidates_and_not_in_a_plan():
    model = Plain(ButterflyMoE(16, 40))
    assert find_feed_forward(model) == []
    assert len(swap_feed_forward(model)) == 0
    assert plan_from_state_dict(model.state_dict())["replacements"] == []


def test_the_text_is_text_in_a_notebook_too(monkeypatch):
    """Inside Jupyter rich would display the table and leave the text empty."""
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    report = swap_feed_forward(
        nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))})
    )
    assert "mlp" in str(report)
