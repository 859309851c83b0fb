"""FSDP2 (`ModelParallelStrategy`) in two processes; what else is refused."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_bfmoe import ButterflyMoECallback, swap_feed_forward
from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import moe_layers
from tests.lightning.modules import Base, InInit, make_net, make_trainer
from tests.lightning.processes import run_ranks, two_processes
from tests.lightning.test_processes import PartOf

pytestmark = two_processes
BATCHES, SIZE = 6, 8


class Sharded(InInit):
    """Layers in `__init__`, sharding in `configure_model`: the callback swaps in between."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def configure_model(self):
        shard(self)


class SwapsByHand(Base):
    """All in `configure_model`: build, swap, shard."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(1)  # Lightning may have seeded anew since the module was made
            self.net = make_net().double()
            swap_feed_forward(self.net, num_experts=4, balance_rate=0.01)
            shard(self)


class SwapsTooLate(InInit):
    """Layers that are built and sharded before anybody can swap."""

    def __init__(self):
        super().__init__()
        self.net = None

    configure_optimizers = Sharded.configure_optimizers

    def configure_model(self):
        self.net = make_net()
        shard(self)


def shard(module):
    if getattr(module, "_device_mesh", None) is None or is_sharded(module):
        return
    for block in module.net:
        fully_shard(block, mesh=module.device_mesh["data_parallel"])
    fully_shard(module.net, mesh=module.device_mesh["data_parallel"])


def is_sharded(module):
    return any(isinstance(p, DTensor) for p in module.parameters())


class Save(L.Callback):
    """Saves after some batches, and says what stood in the optimizer."""

    def __init__(self, at, path):
        self.at, self.path, self.seen, self.held = at, path, 0, None

    def on_train_batch_end(self, trainer, module, *_):
        self.seen += 1
        if self.seen == self.at:
            trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer, module):
        groups = trainer.optimizers[0].param_groups
        self.held = sum(len(group["params"]) for group in groups)


def train(folder, kind, devices, resume=None):
    torch.manual_seed(1)
    module = kind().double()
    sharded = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=False)
    saves = Save(BATCHES, folder / "half.ckpt")
    trainer = make_trainer(
        folder,
        ButterflyMoECallback(num_experts=4, verbose=False, balance_rate=0.01),
        saves,
        devices=devices,
        strategy=sharded if devices > 1 else "auto",
        use_distributed_sampler=False,
    )
    trainer.fit(module, PartOf(BATCHES, SIZE), ckpt_path=resume)
    assert len(list(moe_layers(module))) == 2
    assert saves.held == len(list(module.parameters()))
    if devices > 1:
        assert all(isinstance(p, DTensor) for p in module.parameters())
        full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        return full, module.losses
    return module.state_dict(), module.losses


def assert_trained_as_one(alone, ranks):
    (first, _), *_ = ranks
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)
    moved = [name for name in alone if name.endswith("balance_bias") and alone[name].any()]
    assert len(moved) == 2


@pytest.mark.parametrize("kind", [Sharded, SwapsByHand])
def test_two_shards_train_as_one_process(kind, tmp_path):
    alone, _ = train(tmp_path, kind, 1)
    assert_trained_as_one(alone, run_ranks(train, tmp_path, tmp_path, kind, 2))


def test_a_sharded_training_is_resumed(tmp_path):
    alone, _ = train(tmp_path, Sharded, 1)
    run_ranks(train, tmp_path, tmp_path, Sharded, 2)
    ranks = run_ranks(train, tmp_path, tmp_path, Sharded, 2, tmp_path / "half.ckpt")
    assert [len(losses) for _, losses in ranks] == [BATCHES, BATCHES]
    assert_trained_as_one(alone, ranks)


def test_layers_that_are_sharded_already_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(RuntimeError, match="swap_feed_forward|before fully_shard"):
        run_ranks(train, tmp_path, tmp_path, SwapsTooLate, 2)


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy", "MyStrategy"])
def test_other_strategies_are_refused(name, tmp_path):
    base = L.pytorch.strategies.SingleDeviceStrategy
    own = type(name, (L.pytorch.strategies.Strategy if name == "MyStrategy" else base,), {})
    trainer = make_trainer(tmp_path)
    trainer.strategy.__class__ = own
    with pytest.raises(SwapError, match=f"got strategy {name}: .*ModelParallelStrategy: swap_feed"):
        guards.check_strategy(trainer, InInit())


def test_lightnings_strategies_are_known_by_their_names():
    """By name, because pytorch_lightning has the same classes again."""
    for name in guards._SUPPORTED | set(guards._REFUSED):
        module = L.pytorch.strategies
        assert getattr(module, name, None) is not None or name.endswith("XLAStrategy"), name
