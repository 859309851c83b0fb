"""Workers that are spawned or forked: the caller's module comes back swapped and trained."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEStrategy, ExpertUsage
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.strategy.launchers import SwappingLauncher, swap_like
from tests.lightning.modules import (
    MODULES,
    PLACES,
    InInit,
    InSetup,
    Loader,
    assert_same_state,
    make_net,
    make_trainer,
    state_of,
)
from tests.lightning.processes import two_processes
from tests.lightning.test_processes import SaveEveryRank

pytestmark = two_processes


@pytest.fixture(autouse=True)
def _no_fork_after_cuda():
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")


def fit(module, folder, *callbacks, strategy="bfmoe_ddp_fork", **settings):
    trainer = make_trainer(
        folder, *callbacks, SaveEveryRank(folder), devices=2, strategy=strategy, **settings
    )
    assert isinstance(trainer.strategy.launcher, SwappingLauncher)
    trainer.fit(module, Loader())
    return trainer


@pytest.mark.parametrize("place", PLACES)
def test_the_callers_module_is_swapped_and_trained(place, tmp_path):
    """Layers of `setup` and `configure_model` are built in the caller's process by these hooks."""
    module = MODULES[place]()
    trainer = fit(module, tmp_path)
    trained = torch.load(tmp_path / "rank0.pt")
    assert len(list(moe_layers(module))) == 2
    mine = state_of(module)
    assert mine.keys() == trained.keys()
    assert all(torch.equal(mine[name], value) for name, value in trained.items())
    # The callback, brought by the strategy, counted in the worker.
    assert trainer.strategy.callback.clock.step == 12
    (result,) = trainer.test(module, Loader(), verbose=False)
    assert result["test_loss"] > 0


def test_what_a_callback_recorded_comes_back(tmp_path):
    usage = ExpertUsage(every_n_steps=4)
    fit(InInit(), tmp_path, ButterflyMoECallback(num_experts=4, verbose=False), usage)
    assert [record["step"] for record in usage.history] == [4, 8, 12]
    load = usage.history[0]["layers"]["net.0.mlp"]["load"]
    assert sum(load) == 4 * 2 * 4 * 2  # steps, processes, rows of a batch, experts a row


def test_all_that_a_spawned_worker_gets_can_be_pickled(tmp_path):
    """Spawned workers import everything anew, which takes half a minute: only the pickle is run."""
    strategy = ButterflyMoEStrategy(num_experts=2, start_method="spawn", compress="bf16")
    trainer = make_trainer(tmp_path, devices=2, strategy=strategy)
    strategy.bring_callback(trainer)
    strategy.traffic.narrow = {1, 2}
    launcher, again = pickle.loads(pickle.dumps((strategy.launcher, trainer)))
    assert isinstance(launcher, SwappingLauncher) and launcher._start_method == "spawn"
    assert launcher._strategy is again.strategy
    assert again.callbacks[0] is again.strategy.callback
    assert again.strategy.traffic.narrow == set()


class NeedsData(InSetup):
    """Builds its layers from what only the workers have."""

    def setup(self, stage):
        assert self.trainer.world_size == 2
        super().setup(stage)


def test_a_module_that_cannot_be_built_here_is_a_warning_with_the_way_out(tmp_path):
    module, checkpoint = NeedsData(), ModelCheckpoint(tmp_path, filename="last")
    with pytest.warns(UserWarning, match=r"not attached to a .*\. Read them with .*last.ckpt"):
        fit(module, tmp_path, checkpoint, enable_checkpointing=True)
    assert module.net is None


def test_weights_without_a_place_are_a_warning():
    module = InInit()
    state = {**state_of(module), "head.weight": torch.ones(1)}
    with pytest.warns(UserWarning, match=r"\(it has no head.weight\). Look elsewhere."):
        swap_like(module, state, "Look elsewhere.")


def test_a_swapped_module_is_left_as_it_is():
    module, other = InInit(), InInit()
    other.net = make_net()
    swap_like(module, state_of(other), "")
    assert len(list(moe_layers(module))) == 0
    assert_same_state(module, module)


def test_the_private_launcher_is_what_it_was():
    for name in ("launch", "get_extra_results", "update_main_process_results"):
        assert callable(getattr(_MultiProcessingLauncher, name)), name
    with pytest.raises(ValueError, match="start method 'none' is not available"):
        _MultiProcessingLauncher(None, start_method="none")
