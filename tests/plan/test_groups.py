"""Splitting the groups of an optimizer that somebody else built; schedulers and state go on."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan import GROUP_KEY, split_parameter_groups
from tests.plan.spy import spy_on_steps

OPTIMIZERS = {
    "adamw": lambda groups: AdamW(groups, lr=0.01, weight_decay=0.1),
    "sgd": lambda groups: SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam": lambda groups: Adam(groups, lr=0.01),
}


def sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return lr_scheduler.SequentialLR(optimizer, [warm, rest], [3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=20, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "cosine_to_a_minimum": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-3),
    "sequential": sequential,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=1e-4),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "chained": chained,
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 3, cycle_momentum=False),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10),
}


class Parameters:
    """One parameter of each role, in two groups of a user."""

    def __init__(self, optimizer="adamw", groups=2):
        make = [nn.Parameter(torch.full((2,), float(i))) for i in range(6)]
        self.dense, self.latent, self.angle, self.router, self.gain, self.other = make
        self.roles = {
            self.latent: "latent",
            self.angle: "angle",
            self.router: "router",
            self.gain: "gain",
        }
        first = {"params": make[:5]}
        given = [first, {"params": [self.other], "lr": 0.002, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[optimizer](given[:groups])

    def step(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        self.optimizer.step()

    def rates(self):
        """Learning rate of each role's group in the middle of a step."""
        seen = {}
        end = spy_on_steps(
            self.optimizer, lambda g: seen.update({id(p): g["lr"] for p in g["params"]})
        )
        self.step()
        end()
        names = ("dense", "latent", "angle", "router", "gain", "other")
        return {n: seen[id(getattr(self, n))] for n in names if id(getattr(self, n)) in seen}

    @property
    def groups(self):
        return self.optimizer.param_groups

    def of(self, parameter):
        """The group that holds a parameter."""
        groups = self.optimizer.param_groups
        (found,) = [g for g in groups if any(p is parameter for p in g["params"])]
        return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_angles_learn_faster_and_only_matrices_decay(name):
    p = Parameters(name)
    decay = p.of(p.dense)["weight_decay"]
    split_parameter_groups(p.optimizer, p.roles, 20.0)
    assert p.rates() == {
        **dict.fromkeys(("dense", "latent", "router", "gain"), 0.01),
        "angle": pytest.approx(0.2),
        "other": 0.002,
    }
    assert [p.of(q)["weight_decay"] for q in (p.angle, p.router, p.gain)] == [0, 0, 0]
    assert [group["lr"] for group in p.groups if group is not p.of(p.other)].count(0.01) >= 2
    assert p.of(p.dense) is p.of(p.latent) is p.optimizer.param_groups[0]
    assert p.of(p.dense)["weight_decay"] == decay
    assert p.of(p.other) is p.optimizer.param_groups[1] and p.of(p.other)["lr"] == 0.002
    assert p.of(p.angle).keys() - {GROUP_KEY} == p.of(p.dense).keys()


def test_the_state_is_kept_and_a_second_split_changes_nothing():
    p = Parameters()
    p.step()
    before = copy.deepcopy(p.optimizer.state[p.angle])
    list_object = p.optimizer.param_groups
    assert split_parameter_groups(p.optimizer, p.roles) == 2
    assert p.optimizer.param_groups is list_object  # Lightning's wrapper holds this list
    groups = [dict(group) for group in p.optimizer.param_groups]
    assert split_parameter_groups(p.optimizer, p.roles) == 0
    assert all(a == b for a, b in zip(groups, p.optimizer.param_groups, strict=True))
    assert torch.equal(before["exp_avg"], p.optimizer.state[p.angle]["exp_avg"])
    p.step()
    assert p.optimizer.state[p.angle]["step"] == 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedulers_go_on_as_if_the_groups_had_been_there(optimizer, scheduler):
    plain, split = Parameters(optimizer), Parameters(optimizer)
    schedules = [SCHEDULERS[scheduler](p.optimizer) for p in (plain, split)]
    split_parameter_groups(split.optimizer, split.roles, 20.0, schedulers=[schedules[1]])
    for _ in range(8):
        theirs, ours = plain.rates(), split.rates()
        assert ours == {**theirs, "angle": 20 * theirs["angle"]}
        for schedule in schedules:
            schedule.step(*((1.0,) if scheduler == "plateau" else ()))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_stopped_run_goes_on_from_its_state_dicts(scheduler):
    def start():
        p = Parameters()
        schedule = SCHEDULERS[scheduler](p.optimizer)
        split_parameter_groups(p.optimizer, p.roles, schedulers=[schedule])
        return p, schedule

    def advance(p, schedule, steps):
        for _ in range(steps):
            p.step()
            schedule.step(*((1.0,) if scheduler == "plateau" else ()))

    whole, first, second = start(), start(), start()
    advance(*whole, 7)
    advance(*first, 3)
    second[0].optimizer.load_state_dict(copy.deepcopy(first[0].optimizer.state_dict()))
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    advance(*second, 4)
    rates = [[g["lr"] for g in p.optimizer.param_groups] for p, _ in (whole, second)]
    assert rates[0] == rates[1]


def test_a_group_of_angles_alone_stays_one_group():
    angle, dense = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [dense]}, {"params": [angle]}], lr=0.01)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert split_parameter_groups(optimizer, {angle: "angle"}, schedulers=[schedule]) == 0
    angle.grad = dense.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]
    moved = [1 - p.detach()[0].item() for p in (dense, angle)]
    assert moved == pytest.approx([0.01 + 0.0001, 0.2], rel=1e-5)  # AdamW decays the dense one


def test_names_travel_with_their_parameters():
    model = nn.Linear(2, 2)
    optimizer = SGD(model.named_parameters(), lr=0.1)
    split_parameter_groups(optimizer, {model.bias: "angle"})
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_without_decay_only_the_angles_move():
    p = Parameters("adam", groups=1)
    assert split_parameter_groups(p.optimizer, p.roles) == 1
    assert [len(group["params"]) for group in p.optimizer.param_groups] == [4, 1]
    assert p.optimizer.param_groups[0]["params"][1] is p.latent


def test_an_optimizer_of_one_group_is_left_alone():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([p])
    assert split_parameter_groups(optimizer, {p: "angle"}) == 0
    assert len(optimizer.param_groups) == 1


def test_rates_in_tensors_are_not_shared_between_groups():
    p = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW(p, lr=torch.tensor(0.01))
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    split_parameter_groups(optimizer, {p[1]: "router"}, schedulers=[schedule])
    for loss in (1.0, 2.0):
        schedule.step(loss)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.005] * 2)


def test_one_number_written_into_all_groups_is_multiplied_too():
    """As a warm-up in `optimizer_step`, or the learning-rate finder, writes it."""
    p = Parameters()
    split_parameter_groups(p.optimizer, p.roles, 20.0)
    for group in p.groups:
        group["lr"] = 0.003
    assert p.rates()["angle"] == pytest.approx(0.06) and p.rates()["dense"] == 0.003
    split_parameter_groups(p.optimizer, p.roles, 5.0)  # another factor, not one on top
    assert p.rates()["angle"] == pytest.approx(0.015)


def test_latents_come_apart_only_when_asked():
    p = Parameters(groups=1)
    assert split_parameter_groups(p.optimizer, p.roles, latents_apart=True) == 3
    assert [group.get(GROUP_KEY) for group in p.groups] == [None, "latent", "plain", "angle"]
    latent, dense = p.of(p.latent), p.of(p.dense)
    assert latent["weight_decay"] == dense["weight_decay"] == 0.1
    assert len(latent["params"]) == 1 and latent["lr"] == dense["lr"]


def test_the_factor_of_one_needs_no_hooks():
    class Hookless(SGD):
        register_step_pre_hook = property()

    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert split_parameter_groups(Hookless([p, q], lr=1.0), {p: "angle"}, 1.0) == 1
    with pytest.raises(ConfigError, match="step hooks: got Hookless. Use angle_lr_factor=1.0"):
        split_parameter_groups(Hookless([p, q], lr=1.0), {p: "angle"}, 2.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf")])
def test_a_factor_is_positive(factor):
    with pytest.raises(ConfigError, match="angle_lr_factor must be a finite number > 0"):
        split_parameter_groups(SGD([torch.ones(1)], lr=1), {}, factor)
