"""Angle groups in a module's own optimizers and schedulers, in a Trainer and across a resume."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.layers import parameter_roles
from tests.lightning.modules import InInit, Loader, StopAt, assert_same_state, make_trainer
from tests.plan.spy import spy_on_steps


def adamw(parameters):
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def sgd(parameters):
    return SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)


def adam(parameters):
    return Adam(parameters, lr=0.01)


def sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.StepLR(optimizer, 4)], [3])


SETUPS = {
    "adamw-lambda": (adamw, lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))),
    "adamw-one-cycle": (adamw, lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=12)),
    "sgd-cosine": (sgd, lambda o: lr_scheduler.CosineAnnealingLR(o, 12)),
    "adamw-cosine-to-a-minimum": (
        adamw,
        lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.005),
    ),
    "sgd-sequential": (sgd, sequential),
    "adam-plateau": (adam, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2)),
    "adam-step": (adam, lambda o: lr_scheduler.StepLR(o, 5)),
    "adamw-none": (adamw, None),
}


class Scheduled(InInit):
    def __init__(self, setup):
        super().__init__()
        self.make_optimizer, self.make_scheduler = SETUPS[setup]

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        scheduler |= {"monitor": "loss", "reduce_on_plateau": "Plateau" in str(scheduler)}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def rates_and_decays(module, optimizer):
    """Learning rate and decay by role ("dense": not ours), as the groups hold them now."""
    roles = parameter_roles(module)
    found = {}
    for name, parameter in module.named_parameters():
        (group,) = (g for g in optimizer.param_groups if any(parameter is p for p in g["params"]))
        found.setdefault(roles.get(name, "dense"), set()).add((group["lr"], group["weight_decay"]))
    assert all(len(values) == 1 for values in found.values())
    return {role: values.pop() for role, values in found.items()}


class Steps(Callback):
    """What each optimizer step is taken with, by role."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        (optimizer,) = trainer.optimizers

        def note(group):
            if group is optimizer.param_groups[-1]:
                self.seen.append(rates_and_decays(module, optimizer))

        spy_on_steps(optimizer, note)


def run(setup, tmp_path, *others, factor=20.0, **fit):
    torch.manual_seed(1)
    module = Scheduled(setup)
    ours = ButterflyMoECallback(
        num_experts=4, gains=True, angle_lr_factor=factor, verbose=False, switch_weight=0.1
    )
    trainer = make_trainer(tmp_path, ours, *others)
    trainer.fit(module, Loader(), **fit)
    return module, trainer


@pytest.mark.parametrize("setup", SETUPS)
def test_angles_have_their_own_groups_and_a_resume_is_exact(setup, tmp_path):
    steps = Steps()
    whole, trainer = run(setup, tmp_path, steps)
    assert len(steps.seen) == 12
    for found in steps.seen:
        rate, decay = found["dense"]
        assert found["latent"] == (rate, decay)
        assert found["angle"] == (20 * rate, 0)
        assert found["gain"] == found["router"] == found["bias"] == (rate, 0)
    between = rates_and_decays(whole, trainer.optimizers[0])
    assert len({rate for rate, _ in between.values()}) == 1

    run(setup, tmp_path, StopAt(5, tmp_path / "five.ckpt"))
    resumed, again = run(setup, tmp_path, ckpt_path=tmp_path / "five.ckpt")
    assert_same_state(whole, resumed)
    groups = [t.optimizers[0].param_groups for t in (trainer, again)]
    assert [g["lr"] for g in groups[0]] == [g["lr"] for g in groups[1]]


def test_factor_one_gives_all_parameters_one_rate(tmp_path):
    steps = Steps()
    run("adamw-none", tmp_path, steps, factor=1.0)
    found = steps.seen[-1]
    assert {rate for rate, _ in found.values()} == {0.01}
    assert found["angle"][1] == 0.0 and found["latent"][1] == 0.1


def test_a_warm_up_in_optimizer_step_leaves_the_factor(tmp_path):
    """The recipe of Lightning's documentation: one number into all groups."""

    class Warm(InInit):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = self.hparams.lr * min(1.0, (self.trainer.global_step + 1) / 4)

    steps, module = Steps(), Warm()
    trainer = make_trainer(tmp_path, ButterflyMoECallback(num_experts=2, verbose=False), steps)
    trainer.fit(module, Loader())
    assert [found["angle"][0] / found["dense"][0] for found in steps.seen] == [5.0] * 12
    assert len({found["dense"][0] for found in steps.seen}) == 4
