"""Two processes train as one, under Lightning's plain `ddp` with the callback, and under ours."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_bfmoe import ButterflyMoECallback, ExpertUsage
from lightning_bfmoe.errors import ReplicaError
from lightning_bfmoe.plan import Plan
from lightning_bfmoe.strategy import parameter_checksums
from tests.lightning.modules import InInit, Loader, blend_in, make_trainer, state_of
from tests.lightning.processes import run_ranks, two_processes

pytestmark = two_processes
BATCHES, SIZE = 6, 8
STRATEGIES = ["ddp", "bfmoe"]


class Momentum(InInit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SaveEveryRank(Callback):
    """Writes what each process ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save(state_of(module), self.folder / f"rank{trainer.global_rank}.pt")


class Blends(Callback):
    """Lambda of every step."""

    def __init__(self):
        self.values = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append(blend_in(module.state_dict()))


class PartOf(Loader):
    """This process's rows of each global batch."""

    dtype = torch.float64

    def __iter__(self):
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        for x, y in self.data:
            yield x.to(self.dtype)[rank::world], y[rank::world]


class SinglePart(PartOf):
    dtype = torch.float32


def train(folder, processes, strategy, loader=PartOf, **settings):
    """State, losses, lambda of each step and expert load that a process ends with."""
    torch.manual_seed(1)
    module = Momentum().to(loader.dtype)
    blends, usage = Blends(), ExpertUsage(every_n_steps=3)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 1, **settings}
    ours = ButterflyMoECallback(
        num_experts=4, verbose=False, balance_rate=0.01, z_weight=1e-3,
        plan=Plan(start=2, end=5, shape="linear", angle_warmup=3, freeze_latents=1),
    )  # fmt: skip
    trainer = make_trainer(
        folder, ours, blends, usage,
        devices=processes, strategy=strategy, use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(module, loader(BATCHES, SIZE))
    sums = parameter_checksums(module).tolist()
    return state_of(module), module.losses, blends.values, usage.history, sums


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(strategy, accumulate, tmp_path):
    """Parameters, balance biases, lambda and expert loads, with and without accumulation.

    Without a Switch loss, which is a product of means over the tokens of one process.
    """
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2 * accumulate}
    alone, _, blends, usage, _ = train(tmp_path, 1, "auto", **settings)
    ranks = run_ranks(lambda: train(tmp_path, 2, strategy, **settings), tmp_path)
    (first, _, *rest), (second, _, *others) = ranks
    assert rest == others
    assert rest[0] == blends and 0 < blends[3] < 1 and blends[-1] == 1
    assert rest[1] == usage and [record["step"] for record in usage] == [3, 6, 9, 12]
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)
    moved = [name for name in alone if name.endswith("balance_bias") and alone[name].any()]
    assert len(moved) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_curve_is_that_of_one_process(strategy, tmp_path):
    """In float32, to 1e-5; the checksums of all parameters agree to the bit."""
    _, alone, *_ = train(tmp_path, 1, "auto", SinglePart)
    (_, first, *_, sums), (_, second, *_, others) = run_ranks(
        train, tmp_path, tmp_path, 2, strategy, SinglePart
    )
    assert sums == others and len(alone) == len(first) == 2 * BATCHES
    mean = (torch.tensor(first, dtype=torch.float64) + torch.tensor(second)) / 2
    torch.testing.assert_close(mean, torch.tensor(alone, dtype=mean.dtype), rtol=0, atol=1e-5)
    assert alone[0] - alone[-1] > 0.01


class Freeze(Callback):
    """What a finetuning callback does after the model is wrapped."""

    def on_train_start(self, trainer, module):
        for name, parameter in module.named_parameters():
            if name.endswith("angles"):
                parameter.requires_grad_(False)


def changed_after_wrapping(folder):
    ours = ButterflyMoECallback(num_experts=4, verbose=False)
    trainer = make_trainer(folder, ours, Freeze(), devices=2, strategy="ddp")
    try:
        trainer.fit(Momentum(), SinglePart(BATCHES, SIZE))
    except ReplicaError as error:
        return str(error)
    return "no error"


def test_plain_ddp_says_when_the_trainable_set_changes(tmp_path):
    for message in run_ranks(changed_after_wrapping, tmp_path, tmp_path):
        assert "under plain DDP requires_grad stays" in message
        assert "8 parameters" in message and "strategy='bfmoe'" in message
