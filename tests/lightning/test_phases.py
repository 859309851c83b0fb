"""Frozen latents, then all; and BitNet's two stages: exact, resumed, and unseen by schedulers."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import LBFGS, SGD, Adam, AdamW, lr_scheduler

from lightning_bfmoe import AngleWarmup, ButterflyMoECallback
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import parameter_roles
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import InInit, Loader, StopAt, assert_same_state, make_trainer
from tests.plan.spy import spy_on_steps

OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
}


class Module(InInit):
    """A user's module, with a scheduler that steps with the optimizer."""

    def __init__(self, optimizer="adamw", schedule=True):
        super().__init__()
        self.make, self.schedule = OPTIMIZERS[optimizer], schedule

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if not self.schedule:
            return optimizer
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Watch(Callback):
    """The parameters after each batch, by role, and the factors of each step by group."""

    def __init__(self):
        self.latents, self.others, self.groups, self.between = [], [], [], []

    def on_train_start(self, trainer, module):
        (optimizer,) = trainer.optimizers

        def look(group):
            if group is optimizer.param_groups[0]:
                self.groups.append([])
            self.groups[-1].append((group["lr"], group["weight_decay"]))

        spy_on_steps(optimizer, look)
        self.note(module)

    def on_train_batch_end(self, trainer, module, *_):
        self.note(module)
        self.between.append(
            [(g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups]
        )

    def note(self, module):
        roles = parameter_roles(module)
        kept = {n: p.detach().clone() for n, p in module.named_parameters() if n in roles}
        self.latents.append({n: p for n, p in kept.items() if roles[n] == "latent"})
        self.others.append({n: p for n, p in kept.items() if roles[n] != "latent"})


def callback(**plan):
    settings = {"num_experts": 4, "gains": True, "switch_weight": 0.1, "verbose": False}
    return ButterflyMoECallback(plan=Plan(start=0.1, end=0.9, **plan), **settings)


def run(tmp_path, *callbacks, optimizer="adamw", trainer=None, schedule=True, **fit):
    torch.manual_seed(1)
    module = Module(optimizer, schedule)
    trainer = make_trainer(tmp_path, *callbacks, **(trainer or {}))
    trainer.fit(module, Loader(), **fit)
    return module, trainer


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("freeze", "frozen"), [(5, 5), (0.25, 3)])
def test_latents_stand_still_first_while_all_else_learns(optimizer, freeze, frozen, tmp_path):
    watch = Watch()
    module, _ = run(tmp_path, callback(freeze_latents=freeze), watch, optimizer=optimizer)
    assert all(p.requires_grad for p in module.parameters())
    for step in range(12):
        wanted = set() if step < frozen else set(watch.latents[0])
        assert moved(watch.latents[step], watch.latents[step + 1]) == wanted, step
    assert moved(watch.others[0], watch.others[frozen]) == set(watch.others[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frozen_phase_in_the_middle_of_accumulation_counts_steps(optimizer, tmp_path):
    watch = Watch()
    settings = {"accumulate_grad_batches": 2}
    run(tmp_path, callback(freeze_latents=2), watch, optimizer=optimizer, trainer=settings)
    still = [not moved(watch.latents[0], now) for now in watch.latents]
    assert still == [True] * 6 + [False] * 7  # the third optimizer step is that of batch six


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_second_stage_is_what_a_user_would_have_written(optimizer, tmp_path):
    """Against a training whose own hooks set the values of the second stage."""

    class ByHand(Module):
        def on_before_optimizer_step(self, optimizer):
            for group, (rate, decay) in zip(optimizer.param_groups, self.own, strict=True):
                late = self.trainer.global_step >= 6
                group["lr"] = rate * 0.5 if late else rate
                group["weight_decay"] = decay * 0.25 if late else decay

        def on_train_start(self):
            self.own = [(g["lr"], g["weight_decay"]) for g in self.optimizers().param_groups]

    plan = {"second_stage": 0.5, "second_lr_factor": 0.5, "second_decay_factor": 0.25}
    found, _ = run(tmp_path, callback(**plan), optimizer=optimizer, schedule=False)
    torch.manual_seed(1)
    wanted = ByHand(optimizer, schedule=False)
    make_trainer(tmp_path, callback()).fit(wanted, Loader())
    assert found.losses == wanted.losses
    assert_same_state(found, wanted)


def test_no_scheduler_sees_a_factor(tmp_path):
    watch, plain = Watch(), Watch()
    phases = {"freeze_latents": 4, "angle_warmup": 3, "second_stage": 0.5}
    run(tmp_path, callback(**phases), watch)
    run(tmp_path, callback(), plain)
    rates = [[{rate for rate, _ in groups} for groups in w.between] for w in (watch, plain)]
    assert rates[0] == rates[1] and all(len(step) == 1 for step in rates[0])
    rate = [groups[0][0] for groups in watch.groups]
    base = [0.01 / (1 + step) for step in range(12)]
    assert rate == pytest.approx([r * (0.6 if i >= 6 else 1) for i, r in enumerate(base)])
    assert [{decay for _, decay in groups} for groups in watch.groups] == (
        [{0.0, 0.1}] * 6 + [{0.0}] * 6
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [2, 7])
def test_a_resume_within_each_phase_is_exact(optimizer, stop, tmp_path):
    plan = {"freeze_latents": 4, "second_stage": 0.5, "angle_warmup": 0.25}
    whole, _ = run(tmp_path, callback(**plan), optimizer=optimizer)
    stop_at = StopAt(stop, tmp_path / "stop.ckpt")
    run(tmp_path, callback(**plan), stop_at, optimizer=optimizer)
    again, _ = run(
        tmp_path, callback(**plan), optimizer=optimizer, ckpt_path=tmp_path / "stop.ckpt"
    )
    assert_same_state(whole, again)


def test_a_resume_without_the_frozen_phase_keeps_its_groups(tmp_path):
    run(tmp_path, callback(freeze_latents=3), StopAt(6, tmp_path / "stop.ckpt"))
    with pytest.warns(UserWarning, match="'freeze_latents': 3.*going on with"):
        _, trainer = run(tmp_path, callback(), ckpt_path=tmp_path / "stop.ckpt")
    assert len(trainer.optimizers[0].param_groups) == 4


def test_a_resume_with_a_new_frozen_phase(tmp_path):
    """A phase that is over needs no group; one that goes on is an error that says so."""
    run(tmp_path, callback(), StopAt(6, tmp_path / "stop.ckpt"))
    with pytest.warns(UserWarning, match="going on with Plan.*freeze_latents=5"):
        _, trainer = run(tmp_path, callback(freeze_latents=5), ckpt_path=tmp_path / "stop.ckpt")
    assert len(trainer.optimizers[0].param_groups) == 3
    with (
        pytest.warns(UserWarning, match="going on with Plan.*freeze_latents=9"),
        pytest.raises(ConfigError, match="got AdamW.*resume it with freeze_latents=0"),
    ):
        run(tmp_path, callback(freeze_latents=9), ckpt_path=tmp_path / "stop.ckpt")


def test_an_optimizer_of_one_group_cannot_freeze(tmp_path):
    class OneGroup(Module):
        def configure_optimizers(self):
            return LBFGS(self.parameters(), lr=0.01)

    with pytest.raises(ConfigError, match="got LBFGS.*use another optimizer"):
        make_trainer(tmp_path, callback(freeze_latents=3)).fit(OneGroup(), Loader())


def test_a_rate_set_in_the_training_step_is_scaled_too(tmp_path):
    """Lightning runs `training_step` inside the optimizer's step; many set their rate there."""

    class SetsRate(Module):
        def training_step(self, batch, batch_idx):
            for group in self.optimizers().param_groups:
                assert group["lr"] == self.hparams.lr * 0.9 ** max(self.trainer.global_step - 1, 0)
                group["lr"] = self.hparams.lr * 0.9**self.trainer.global_step
            return super().training_step(batch, batch_idx)

    watch = Watch()
    make_trainer(tmp_path, callback(second_stage=6, second_lr_factor=0.5), watch).fit(
        SetsRate(schedule=False), Loader()
    )
    wanted = [0.01 * 0.9**step * (0.5 if step >= 6 else 1) for step in range(12)]
    assert [groups[0][0] for groups in watch.groups] == pytest.approx(wanted)
    assert [groups[-1][0] for groups in watch.groups] == pytest.approx([5 * r for r in wanted])


def test_an_interrupted_training_leaves_the_users_values(tmp_path):
    class Interrupted(Module):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 7:
                raise RuntimeError("stopped here")

    ours = callback(second_stage=0.5, second_lr_factor=0.5)
    trainer, module = make_trainer(tmp_path, ours), Interrupted(schedule=False)
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer.fit(module, Loader())
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.01}
    assert not ours.angles._handles


def test_one_optimizer_has_one_second_stage(tmp_path):
    plan = Plan(second_stage=0.5)
    settings = {"num_experts": 2, "verbose": False}
    first = ButterflyMoECallback(include="net.0.mlp", name="a", plan=plan, **settings)
    second = ButterflyMoECallback(include="net.1.mlp", name="b", plan=plan, **settings)
    with pytest.raises(ConfigError, match="got 2 callbacks with second_stage= and one optimizer"):
        make_trainer(tmp_path, first, second).fit(InInit(), Loader())


def test_two_callbacks_warm_up_their_own_angles(tmp_path):
    settings = {"num_experts": 2, "verbose": False}
    first = ButterflyMoECallback(
        include="net.0.mlp", name="a", plan=Plan(angle_warmup=3), angle_lr_factor=2.0, **settings
    )
    second = ButterflyMoECallback(
        include="net.1.mlp", name="b", plan=Plan(angle_warmup=1), angle_lr_factor=8.0, **settings
    )
    watch = Watch()
    run(tmp_path, first, second, watch, schedule=False)
    rates = [sorted(rate for rate, _ in groups) for groups in watch.groups]
    assert rates[0] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.04])
    assert rates[2] == pytest.approx([0.01, 0.01, 0.01, 0.015, 0.08])
    assert rates[-1] == pytest.approx([0.01, 0.01, 0.01, 0.02, 0.08])
    assert {rate for groups in watch.between for rate, _ in groups} == {0.01}


def test_the_state_is_plain(tmp_path):
    warmup = AngleWarmup(freeze_latents=0.5, second_stage=3)
    values = [*warmup.state_dict().values(), *warmup.state_dict()["plan"].values()]
    assert {type(value) for value in values} <= {int, float, bool, str, dict, type(None)}
