"""The callbacks that ButterflyMoECallback is made of, alone: for models swapped by hand."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from lightning_bfmoe import AngleWarmup, ButterflyMoECallback, TernarySchedule, swap_feed_forward
from lightning_bfmoe.callbacks import RouterBalance
from lightning_bfmoe.errors import CheckpointError, ConfigError, SwapError
from lightning_bfmoe.layers import moe_layers, routers
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import (
    InConfigureModel,
    InInit,
    InSetup,
    Loader,
    StopAt,
    assert_same_state,
    blend_in,
    make_trainer,
)

PLAN = {"start": 0.1, "end": 0.9, "shape": "linear"}
PHASES = {"freeze_latents": 0.25, "second_stage": 0.5}


def swapped(kind=InInit):
    """A module that swaps by itself, wherever it builds its layers."""
    torch.manual_seed(1)

    class ByHand(kind):
        def configure_model(self):
            super().configure_model()
            if next(moe_layers(self), None) is None:
                settings = {"num_experts": 4, "gains": True, "switch_weight": 0.1}
                swap_feed_forward(self, **settings)

    module = ByHand()
    if kind is InInit:
        module.configure_model()
    return module


def parts(plan=None, warmup=0.5, **phases):
    return (
        TernarySchedule(plan or PLAN),
        AngleWarmup(5.0, warmup, **{**PHASES, **phases}),
        RouterBalance(),
    )


def whole():
    plan = Plan(**PLAN, angle_warmup=0.5, **PHASES)
    return ButterflyMoECallback(plan=plan, verbose=False, num_experts=4, gains=True)


def fit(tmp_path, module, *callbacks, **settings):
    torch.manual_seed(2)
    make_trainer(tmp_path, *callbacks).fit(module, Loader(), **settings)
    return module


def test_the_parts_together_are_the_whole(tmp_path):
    by_parts, by_whole = fit(tmp_path, swapped(), *parts()), fit(tmp_path, swapped(), whole())
    assert by_parts.losses == by_whole.losses
    assert_same_state(by_parts, by_whole)
    assert all(router.balance_bias.any() for _, router in routers(by_parts))


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_the_parts_find_layers_that_are_built_late_in_any_order(kind, tmp_path):
    one, other = fit(tmp_path, swapped(kind), *parts()), swapped(kind)
    fit(tmp_path, other, *reversed(parts()))
    assert_same_state(one, other)
    assert {layer.blend for _, layer in moe_layers(one)} == {1.0}


def test_the_schedule_alone_leaves_rates_and_balance(tmp_path):
    module = swapped()
    trainer = make_trainer(tmp_path, TernarySchedule(PLAN))
    trainer.fit(module, Loader())
    assert {layer.blend for _, layer in moe_layers(module)} == {1.0}
    assert len(trainer.optimizers[0].param_groups) == 1
    assert not any(router.balance_bias.any() for _, router in routers(module))


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resume_of_the_parts_is_exact(stop, tmp_path):
    uninterrupted, first, second = swapped(), swapped(), swapped()
    make_trainer(tmp_path, *parts()).fit(uninterrupted, Loader())
    stop_at = StopAt(stop, tmp_path / "stop.ckpt")
    make_trainer(tmp_path, *parts(), stop_at).fit(first, Loader())
    make_trainer(tmp_path, *parts()).fit(second, Loader(), ckpt_path=tmp_path / "stop.ckpt")
    assert_same_state(uninterrupted, second)
    states = torch.load(tmp_path / "stop.ckpt", weights_only=True)["callbacks"]
    found = {
        key.partition("{")[0]: (state["step"], state["total"]) for key, state in states.items()
    }
    assert found == {"TernarySchedule": (stop, 12), "AngleWarmup": (stop, 12)}


def test_evaluation_can_be_ternary(tmp_path):
    module = swapped()
    schedule = TernarySchedule(Plan(start=0, end=100), evaluate_ternary=True)
    trainer = make_trainer(tmp_path, schedule, StopAt(6, tmp_path / "six.ckpt"))
    with pytest.warns(UserWarning, match="of the plan's 100 steps: the weights are not ternary"):
        trainer.fit(module, Loader())
    before = blend_in(torch.load(tmp_path / "six.ckpt", weights_only=True)["state_dict"])
    assert 0 < before < 0.1
    soft = make_trainer(tmp_path).test(module, Loader(), verbose=False)
    hard = make_trainer(tmp_path, schedule).test(module, Loader(), verbose=False)
    assert soft != hard
    assert {layer.blend for _, layer in moe_layers(module)} == {before}


def test_averaged_copies_follow(tmp_path):
    stop = StopAt(6, tmp_path / "half.ckpt")
    plan = Plan(start=0.0, end=1.0, shape="linear")
    trainer = make_trainer(tmp_path, EMAWeightAveraging(decay=0.5), TernarySchedule(plan), stop)
    trainer.fit(swapped(), Loader())
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert blend_in(state) == 0.5


CONFLICTS = {
    "TernarySchedule": lambda: (whole(), TernarySchedule(PLAN)),
    "AngleWarmup": lambda: (AngleWarmup(), whole()),
    "RouterBalance": lambda: (whole(), RouterBalance("other")),
}


@pytest.mark.parametrize("kind", CONFLICTS)
def test_two_drivers_of_one_layer_are_refused(kind, tmp_path):
    message = rf"one {kind}: got (ButterflyMoECallback and {kind}|{kind} and ButterflyMoECallback)"
    with pytest.raises(ConfigError, match=message + ", both for net.0.mlp.*take the others out"):
        make_trainer(tmp_path, *CONFLICTS[kind]()).fit(swapped(), Loader())


def test_two_schedules_are_refused(tmp_path):
    two = TernarySchedule(PLAN), TernarySchedule(PLAN, name="second")
    with pytest.raises(ConfigError, match="TernarySchedule and TernarySchedule, both for net.0"):
        make_trainer(tmp_path, *two).fit(swapped(), Loader())


@pytest.mark.parametrize("part", [TernarySchedule(), AngleWarmup(), RouterBalance()])
def test_a_model_that_was_not_swapped_is_refused(part, tmp_path):
    message = rf"{type(part).__name__} needs ButterflyMoE layers.*Call swap_feed_forward"
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, part).fit(InInit(), Loader())


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from Loader(batches=2).data


@pytest.mark.parametrize(
    "part", [TernarySchedule(), AngleWarmup(warmup=0.1), AngleWarmup(freeze_latents=0.1)]
)
def test_fractions_of_an_unknown_length_are_refused(part, tmp_path):
    data = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ConfigError, match="give the callback total_steps="):
        make_trainer(tmp_path, part, max_epochs=-1).fit(swapped(), data)


def test_a_warm_up_in_steps_needs_no_length(tmp_path):
    data, warmup = DataLoader(Endless(), batch_size=None), AngleWarmup(warmup=3, freeze_latents=2)
    trainer = make_trainer(tmp_path, warmup, StopAt(4, tmp_path / "s.ckpt"), max_epochs=-1)
    trainer.fit(swapped(), data)
    assert warmup.clock.step == 4 and warmup.now.angle_factor == 1.0


def test_an_optimizer_without_our_parameters_is_refused(tmp_path):
    module = swapped()
    head = torch.optim.SGD(module.net[2].parameters(), lr=0.1)
    module.configure_optimizers = lambda: head
    with pytest.raises(SwapError, match="must be in an optimizer"):
        make_trainer(tmp_path, AngleWarmup()).fit(module, Loader())


def test_states_of_another_version_are_refused():
    state = {**TernarySchedule().state_dict(), "version": 0}
    for part in (TernarySchedule(), AngleWarmup(), whole()):
        with pytest.raises(CheckpointError, match="state has version 1: got 0"):
            part.load_state_dict(state)


def test_now_needs_a_length_only_where_the_plan_does():
    assert TernarySchedule({"start": 0, "end": 4}).now.blend == 0.0
    assert AngleWarmup(warmup=4).now.angle_factor == 0.2
    assert whole().now.phase == "latent" if whole().clock.total else True
    with pytest.raises(ConfigError, match="number of training steps"):
        _ = whole().now
