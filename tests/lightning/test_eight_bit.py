"""bitsandbytes' 8-bit AdamW, on the CPU too: groups, float32 state of small parameters, resume."""

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.optim import AdamW, lr_scheduler

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.layers import parameter_roles
from lightning_bfmoe.plan import Plan, scale_steps, split_parameter_groups
from tests.lightning.modules import (
    CLASSES,
    Base,
    Loader,
    StopAt,
    assert_same_state,
    make_trainer,
)

WIDE = 512
"""Hidden width that makes matrices and angles large enough (4096 numbers) for 8-bit state."""

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=12),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=1e-3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 4)],
        [3],
    ),
    # Lightning saves the end of a batch before it steps a plateau by it, so a resume counts one bad
    # batch fewer; here that changes no rate.
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=12),
    "short-plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


class Module(Base):
    def __init__(self, schedule="lambda"):
        super().__init__()
        self.schedule = schedule
        mlp = nn.Sequential(nn.Linear(8, WIDE), nn.GELU(), nn.Linear(WIDE, 8))
        self.net = nn.Sequential(mlp, nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = bitsandbytes.optim.AdamW8bit(self.parameters(), lr=0.01, weight_decay=0.1)
        scheduler = SCHEDULERS[self.schedule](optimizer)
        plateau = "plateau" in self.schedule
        settings = {"interval": "step", "monitor": "loss", "reduce_on_plateau": plateau}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}


def run(tmp_path, schedule, *others, **fit):
    torch.manual_seed(1)
    plan = Plan(freeze_latents=4, angle_warmup=3, second_stage=8)
    ours = ButterflyMoECallback(num_experts=4, gains=True, plan=plan, verbose=False)
    module, trainer = Module(schedule), make_trainer(tmp_path, ours, *others)
    trainer.fit(module, Loader(), **fit)
    return module, trainer.optimizers[0]


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS.keys() - {"short-plateau"}))
def test_a_training_resumes_exactly_within_each_phase(schedule, tmp_path):
    whole, optimizer = run(tmp_path, schedule)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len(rates) == 4 and len(set(rates)) == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0, 0.0]
    for stop in (3, 9):
        run(tmp_path, schedule, StopAt(stop, tmp_path / "stop.ckpt"))
        resumed, again = run(tmp_path, schedule, ckpt_path=tmp_path / "stop.ckpt")
        assert_same_state(whole, resumed)
        assert [group["lr"] for group in again.param_groups] == rates
        torch.load(tmp_path / "stop.ckpt", weights_only=True)


def test_a_plateau_lowers_all_groups(tmp_path):
    _, optimizer = run(tmp_path, "short-plateau")
    assert {group["lr"] for group in optimizer.param_groups} == {0.001}


def test_only_the_matrices_have_8_bit_state(tmp_path):
    module, optimizer = run(tmp_path, "lambda")
    roles, found = parameter_roles(module), {}
    for name, parameter in module.named_parameters():
        state = optimizer.state[parameter]["state1"]
        if parameter.numel() >= 4096:
            found.setdefault(roles.get(name, "dense"), set()).add(state.dtype)
    assert found.pop("latent") == {torch.uint8}
    assert found == {"angle": {torch.float32}}


def test_an_override_of_the_user_stays():
    angles, gains = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    optimizer = bitsandbytes.optim.AdamW8bit([angles, gains], lr=0.01)
    optimizer.mng.override_config(angles, "optim_bits", 8)
    split_parameter_groups(optimizer, {angles: "angle", gains: "gain"})
    del optimizer.mng.pid2config[id(angles)]  # by id: it would meet another test's parameter
    angles.grad = gains.grad = torch.ones(64, 64)
    optimizer.step()
    dtypes = [optimizer.state[p]["state1"].dtype for p in (angles, gains)]
    assert dtypes == [torch.uint8, torch.float32]


def test_a_float32_state_steps_like_torch():
    """So the factor reaches bitsandbytes as it reaches AdamW, within its own rounding."""
    start = torch.linspace(-1, 1, 4096)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    eight = bitsandbytes.optim.AdamW8bit([ours], lr=0.01, weight_decay=0.0)
    plain = AdamW([theirs], lr=0.2, weight_decay=0.0)
    split_parameter_groups(eight, {ours: "angle"}, 20.0)
    for i in range(5):
        ours.grad = theirs.grad = torch.sin(torch.arange(4096.0) + i)
        eight.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_factor_of_zero_moves_nothing():
    p = nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = bitsandbytes.optim.AdamW8bit([p], lr=0.01, weight_decay=0.1)
    before = p.detach().clone()
    handle = scale_steps(optimizer, lambda group: (0.0, 1.0))
    for _ in range(3):
        p.grad = torch.ones(8192)
        optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["state1"].any()
    handle.remove()
    optimizer.step()
    assert not torch.equal(p, before)
