"""Placements: applied, reverted, rebased, and refused when they do not fit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers.surgery import (
    apply_replacement,
    check_form,
    identity,
    rebase,
    replacement,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.1)
        self.act, self.fast = F.gelu, 1

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[1].fc1 = self.blocks[0].fc1


def plan():
    return replacement(
        "blocks.0.fc1",
        aliases=["blocks.1.fc1"],
        identities=["blocks.0.fc2", "blocks.0.act", "blocks.0.drop"],
        attributes={"blocks.0.fast": 0},
    )


def test_apply_fills_every_slot_and_revert_brings_the_same_objects_back():
    model = Model().eval()
    slots = dict(model.named_modules(remove_duplicate=False))
    layer = nn.Linear(4, 4)
    receipt = apply_replacement(model, plan(), layer)
    block = model.blocks[0]
    assert block.fc1 is layer
    assert model.blocks[1].fc1 is layer
    assert block.act is identity
    assert isinstance(block.fc2, nn.Identity)
    assert block.fast == 0
    assert not layer.training
    assert not block.fc2.training
    assert layer.placement == plan()
    x = torch.randn(2, 4)
    assert torch.equal(block(x), layer(x))
    copy.deepcopy(model)

    receipt.revert()
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(slots)
    assert all(after[name] is slots[name] for name in slots)
    assert block.act is F.gelu
    assert block.fast == 1


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (replacement("blocks.7.fc1"), "no child '7'"),
        (replacement("blocks.0.fc9"), "no attribute 'fc9'"),
        (replacement("blocks.0.act"), "must hold a module"),
        (replacement("blocks.0.fc1", identities=["blocks.0.fast"]), "module or callable"),
        (replacement("blocks.0.fc1", attributes={"blocks.0.fc2": 1}), "plain public attribute"),
        (
            replacement("blocks.0.fc1", attributes={"blocks.0._modules": 1}),
            "plain public attribute",
        ),
        (replacement("blocks.0.fc1", attributes={"blocks.0.forward": 1}), "no attribute 'forward'"),
    ],
)
def test_a_placement_of_another_model_is_refused_and_changes_nothing(entry, match):
    model = Model()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(SwapError, match=match):
        apply_replacement(model, entry, nn.Linear(4, 4))
    assert dict(model.named_modules(remove_duplicate=False)) == before


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (None, "dict with a 'path'"),
        ({"path": 3}, "dict with a 'path'"),
        ({"path": "a", "code": "x"}, "known fields"),
        ({"path": ""}, "dotted path"),
        ({"path": "a..b"}, "dotted path"),
        ({"path": "a", "identities": "abc"}, "must be lists"),
        ({"path": "a", "identities": [3]}, "dotted path"),
        ({"path": "a", "identities": ["a"]}, "each slot once"),
        ({"path": "a", "attributes": {"b": [1]}}, "plain scalars"),
        ({"path": "a", "attributes": {"b": float("nan")}}, "plain scalars"),
        ({"path": "a", "layer": 3}, "must be a dict"),
    ],
)
def test_form_is_checked(entry, match):
    with pytest.raises(SwapError, match=match):
        check_form(entry)


def test_rebase_to_an_inner_and_an_outer_root():
    outer = replacement("net.0", aliases=["net.3"], identities=["net.1"], attributes={"net.2.a": 1})
    inner = rebase(outer, "0")
    assert inner == replacement("0", aliases=["3"], identities=["1"], attributes={"2.a": 1})
    assert rebase(inner, "net.0") == outer == rebase(outer, "net.0")


def test_rebase_refuses_a_moved_layer_and_a_slot_outside():
    with pytest.raises(SwapError, match="stand where its placement says"):
        rebase(replacement("net.0"), "net.1")
    with pytest.raises(SwapError, match="inside the model that is packed"):
        rebase(replacement("net.0.fc", identities=["other.act"]), "fc")
