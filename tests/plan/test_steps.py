"""Factors that hold during a step: what an optimizer computes, and what everybody else sees."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from lightning_bfmoe.plan import scale_steps
from lightning_bfmoe.plan.steps import _scalers
from tests.plan.spy import spy_on_steps

OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
}


def parameter():
    return nn.Parameter(torch.linspace(-1, 1, 5))


def step(optimizer, p, i):
    p.grad = torch.sin(torch.arange(5.0) + i)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_equals_one_of_an_optimizer_with_these_values(name):
    ours, theirs = parameter(), parameter()
    scaled, plain = OPTIMIZERS[name]([ours]), OPTIMIZERS[name]([theirs])
    factors = [(1.0, 1.0), (0.25, 1.0), (0.5, 0.0), (2.0, 0.5)]
    now = iter(factors)
    scale_steps(scaled, lambda group: next(now))
    for i, (rate, decay) in enumerate(factors):
        group = plain.param_groups[0]
        group["lr"], group["weight_decay"] = 0.01 * rate, 0.1 * decay
        if "fused" in name:
            group["lr"] = torch.tensor(0.01) * rate
        step(scaled, ours, i)
        step(plain, theirs, i)
        assert torch.equal(ours, theirs)
        assert float(scaled.param_groups[0]["lr"]) == pytest.approx(0.01)
        assert scaled.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_of_zero_moves_nothing_and_fills_the_moments(name):
    p = parameter()
    optimizer, start = OPTIMIZERS[name]([p]), p.detach().clone()
    handle = scale_steps(optimizer, lambda group: (0.0, 1.0))
    for i in range(3):
        step(optimizer, p, i)
    assert torch.equal(p, start)  # decay goes with the learning rate, in all of them
    moment = "momentum_buffer" if name == "sgd" else "exp_avg"
    assert optimizer.state[p][moment].abs().min() > 0
    handle.remove()
    step(optimizer, p, 3)
    assert not torch.equal(p, start)


def test_lbfgs_which_reads_its_rate_before_the_closure_is_scaled_too():
    def minimise(rate, factor):
        p = parameter()
        optimizer = LBFGS([p], lr=rate, max_iter=2)
        scale_steps(optimizer, lambda group: (factor, 1.0))

        def closure():
            optimizer.zero_grad()
            loss = (p**4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.param_groups[0]["lr"] == rate
        return p

    assert torch.equal(minimise(0.5, 0.5), minimise(0.25, 1.0))


def test_rules_of_several_owners_multiply_and_end_in_any_order():
    p = parameter()
    optimizer, inside = SGD([p], lr=1.0, weight_decay=0.5), []
    handles = [scale_steps(optimizer, lambda group, f=f: (f, f)) for f in (2.0, 3.0, 5.0)]
    spy_on_steps(optimizer, lambda group: inside.append((group["lr"], group["weight_decay"])))
    for i in range(4):
        step(optimizer, p, i)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (
            1.0,
            0.5,
        )
        if i < 3:
            handles[(1, 0, 2)[i]].remove()
    assert inside == [(30.0, 15.0), (10.0, 5.0), (5.0, 2.5), (1.0, 0.5)]


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_a_closure_sees_and_sets_the_users_values(call):
    p, inside = parameter(), []
    optimizer = SGD([p], lr=1.0)
    scale_steps(optimizer, lambda group: (0.5, 1.0))
    spy_on_steps(optimizer, lambda group: inside.append(group["lr"]))

    def closure():
        assert optimizer.param_groups[0]["lr"] == 1.0 - len(inside) / 4
        optimizer.param_groups[0]["lr"] -= 0.25
        p.grad = torch.ones(5)
        return 7.0

    assert [call(optimizer, closure), call(optimizer, closure)] == [7.0, 7.0]
    assert inside == [0.375, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_calls_its_parents_step_is_scaled_once():
    class Child(SGD):
        def step(self, closure=None):
            return super().step(closure)

    p, inside = parameter(), []
    SGD([parameter()], lr=1.0)  # torch hooks a class's step when it is first built
    optimizer = Child([p], lr=1.0)
    scale_steps(optimizer, lambda group: (0.5, 1.0))
    spy_on_steps(optimizer, lambda group: inside.append(group["lr"]))
    p.grad = torch.ones(5)
    optimizer.step()
    optimizer.step(lambda: 0.0)
    assert inside == [0.5, 0.5] and optimizer.param_groups[0]["lr"] == 1.0


def test_a_step_that_raises_leaves_no_factor_behind():
    p = parameter()
    optimizer, fail = SGD([p], lr=1.0), True

    def stop(group):
        assert group["lr"] == 0.5
        if fail:
            raise KeyboardInterrupt("stopped")

    handle = scale_steps(optimizer, lambda group: (0.5, 1.0))
    spy_on_steps(optimizer, stop)
    for _ in range(2):  # the next step starts from the user's value too
        with pytest.raises(KeyboardInterrupt, match="^stopped$"):
            step(optimizer, p, 0)
    handle.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_rule_under_a_known_key_is_replaced():
    p = parameter()
    optimizer, inside = SGD([p], lr=1.0), []
    for factor in (2.0, 3.0):
        scale_steps(optimizer, lambda group, f=factor: (f, 1.0), key="angles")
    spy_on_steps(optimizer, lambda group: inside.append(group["lr"]))
    step(optimizer, p, 0)
    assert inside == [3.0]


def test_optimizers_are_copied_pickled_and_forgotten_as_before():
    optimizer = AdamW([parameter()], lr=0.01)
    scale_steps(optimizer, lambda group: (0.5, 1.0))
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.01
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == 0.01
    gone, before = weakref.ref(optimizer), len(_scalers)
    del optimizer
    gc.collect()
    assert gone() is None and len(_scalers) < before
