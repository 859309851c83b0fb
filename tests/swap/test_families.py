"""Every family: recognised, function-preserving at lambda 0, trainable, restored bit by bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_bfmoe.layers import moe_layers, set_blend
from lightning_bfmoe.swap import find_feed_forward, restore, swap_feed_forward
from tests.swap.zoo import ZOO, make, relative, run, state

pytestmark = pytest.mark.parametrize("name", ZOO)


def test_is_recognised(name):
    model, _ = make(name)
    found = [c for c in find_feed_forward(model) if c.status == "ready"]
    _, family, count, gated, activation, dropout, output_dropout = ZOO[name]
    assert len(found) == count
    for c in found:
        act = c.block.activation if isinstance(c.block.activation, str) else "custom"
        got = (c.family, c.block.gated, act, c.block.dropout, c.block.output_dropout)
        assert got == (family, gated, activation, dropout, output_dropout)


def test_keeps_the_function_at_lambda_0_and_differs_at_lambda_1(name):
    model, ids = make(name)
    with torch.no_grad():
        wanted = run(model, ids)
        report = swap_feed_forward(model, num_experts=4, angle_std=0.0)
        at_one = run(model, ids)
        set_blend(model, 0.0)
        at_zero = run(model, ids)
    assert len(report) == ZOO[name][2] == len(list(moe_layers(model)))
    assert relative(at_zero, wanted) < 1e-5
    assert relative(at_one, wanted) > 1e-3
    assert all(0.05 < block.relative_error < 1.0 for block in report.blocks)


def test_restore_is_bit_identical_with_the_same_objects(name):
    model, ids = make(name)
    before, modules = state(model), dict(model.named_modules(remove_duplicate=False))
    attributes = {path: dict(vars(m)) for path, m in modules.items()}
    wanted = run(model, ids)
    report = swap_feed_forward(model)
    restore(model, report)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    again = dict(model.named_modules(remove_duplicate=False))
    assert list(again) == list(modules)
    assert all(again[path] is modules[path] for path in modules)
    for path, module in again.items():
        assert {k: v for k, v in vars(module).items() if k in attributes[path]} == attributes[path]
    assert torch.equal(run(model, ids), wanted)


def test_gradients_reach_every_new_parameter(name):
    model, ids = make(name)
    swap_feed_forward(model, num_experts=2, top_k=2, gains=True)
    model.train()
    run(model, ids).square().mean().backward()
    for path, layer in moe_layers(model):
        for key, p in layer.named_parameters():
            assert p.grad is not None, f"{path}.{key}"
            assert bool((p.grad != 0).any()), f"{path}.{key}"


def test_the_originals_are_not_in_the_model(name):
    model, ids = make(name)
    originals = {
        id(p)
        for c in find_feed_forward(model)
        if c.status == "ready"
        for m in c.leaves
        for p in m.parameters()
    }
    swap_feed_forward(model)
    assert not originals & {id(p) for p in model.parameters()}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, ids), run(model, ids))
        assert list(copied.state_dict()) == list(model.state_dict())


def test_training_mode_keeps_its_dropout(name):
    model, ids = make(name)
    swap_feed_forward(model, angle_std=0.0, seed=1)
    dropout = any(ZOO[name][5:])
    layers = [layer for _, layer in moe_layers(model)]
    for layer in layers:
        layer.train()
        x = torch.randn(64, layer.d_model)
        same = torch.equal(layer(x), layer(x))
        assert same != dropout
        zeros = float((layer(x) == 0).float().mean())
        assert zeros == pytest.approx(ZOO[name][6], abs=0.06)
        assert isinstance(layer.experts.dropout, nn.Dropout)
        assert layer.experts.dropout.p == ZOO[name][5]
