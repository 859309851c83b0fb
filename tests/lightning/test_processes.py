"""Two processes under Lightning's plain `ddp`: the same training as one process."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_bfmoe import ButterflyMoECallback, swap_feed_forward
from tests.lightning.modules import InInit, Loader, make_trainer, state_of

BATCHES, SIZE = 6, 8


class Momentum(InInit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SaveEveryRank(Callback):
    """Writes what each process ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save(state_of(module), self.folder / f"rank{trainer.global_rank}.pt")


class PartOf(Loader):
    """This process's rows of each global batch."""

    def __iter__(self):
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        for x, y in self.data:
            yield x.double()[rank::world], y[rank::world]


def train(folder, processes):
    folder.mkdir()
    torch.manual_seed(1)
    module = Momentum().double()
    swap_feed_forward(module, num_experts=4, balance_rate=0.01)  # forked workers start from it
    trainer = make_trainer(
        folder,
        ButterflyMoECallback(num_experts=4, verbose=False, balance_rate=0.01),
        SaveEveryRank(folder),
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        use_distributed_sampler=False,
    )
    trainer.fit(module, PartOf(BATCHES, SIZE))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_processes_train_as_one(tmp_path):
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")
    (alone,) = train(tmp_path / "one", 1)
    first, second = train(tmp_path / "two", 2)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)
    moved = [name for name in alone if name.endswith("balance_bias") and alone[name].any()]
    assert len(moved) == 2
