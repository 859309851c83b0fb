"""`ButterflyMoEStrategy` in one process: what it brings, what it refuses, what it costs nothing."""

import inspect

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEStrategy, swap_feed_forward
from lightning_bfmoe.callbacks import TernarySchedule
from lightning_bfmoe.errors import ConfigError, ReplicaError
from lightning_bfmoe.layers import moe_layers, parameter_roles
from lightning_bfmoe.plan import Plan
from lightning_bfmoe.strategy.settings import callback_parameters
from tests.lightning.modules import InInit, Loader, assert_same_state, make_trainer, state_of


def ours(**settings):
    return ButterflyMoEStrategy(verbose=False, **settings)


def fit(tmp_path, *callbacks, module=None, batches=6, **settings):
    torch.manual_seed(0)
    module = module or InInit()
    trainer = make_trainer(tmp_path, *callbacks, **settings)
    trainer.fit(module, Loader(batches))
    return module, trainer


def test_one_process_needs_no_callback_launcher_group_or_wrapper(tmp_path):
    seen = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen["model"] = trainer.strategy.model is module
            seen["group"] = torch.distributed.is_initialized()

    module, trainer = fit(tmp_path, Look(), strategy="bfmoe")
    assert trainer.strategy.launcher is None
    assert seen == {"model": True, "group": False}
    assert len(list(moe_layers(module))) == 2
    assert trainer.strategy.callback.report.blocks
    assert sum(isinstance(c, ButterflyMoECallback) for c in trainer.callbacks) == 1


def test_one_process_trains_as_without_the_strategy(tmp_path):
    plain, _ = fit(tmp_path, ButterflyMoECallback(num_experts=4, verbose=False))
    with_it, trainer = fit(tmp_path, strategy=ours(num_experts=4))
    assert_same_state(plain, with_it)
    groups = trainer.optimizers[0].param_groups
    assert {group.get("bfmoe") for group in groups} == {None, "plain", "angle"}


def test_the_same_trainer_and_module_go_on_and_are_tested(tmp_path):
    module, trainer = fit(tmp_path, strategy=ours(num_experts=4))
    first = trainer.strategy.callback
    before = state_of(module)
    (result,) = trainer.test(module, Loader(), verbose=False)
    assert result["test_loss"] > 0
    trainer.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match="planned for 12 steps and would now take 18"):
        trainer.fit(module, Loader())
    assert trainer.strategy.callback is first and trainer.callbacks.count(first) == 1
    assert not torch.equal(before["net.2.weight"], module.net[2].weight)


def test_its_settings_reach_the_layers_and_the_plan(tmp_path):
    module, trainer = fit(tmp_path, strategy=ours(num_experts=3, top_k=1, plan=Plan(end=0.5)))
    assert {layer.settings["num_experts"] for _, layer in moe_layers(module)} == {3}
    assert trainer.strategy.callback.plan == Plan(end=0.5)


def test_settings_here_and_a_callback_there_are_refused(tmp_path):
    strategy = ours(num_experts=4)
    with pytest.raises(ConfigError, match=r"num_experts=4, verbose=False|verbose=False, num_exp"):
        fit(tmp_path, ButterflyMoECallback(), strategy=strategy)
    with pytest.raises(ConfigError, match=r"Drop the TernarySchedule to go by the strategy's"):
        fit(tmp_path, TernarySchedule(), strategy=ours(num_experts=4))


def test_a_callback_of_the_users_is_left_alone(tmp_path):
    callback = ButterflyMoECallback(num_experts=4, verbose=False)
    module, trainer = fit(tmp_path, callback, strategy="bfmoe")
    assert trainer.strategy.callback is None and trainer.callbacks == [callback]
    by_hand = InInit()
    swap_feed_forward(by_hand, num_experts=2)
    _, trainer = fit(tmp_path, TernarySchedule(Plan(0, 0)), module=by_hand, strategy="bfmoe")
    assert trainer.strategy.callback is None


def test_a_callback_of_the_module_wins(tmp_path):
    class Brings(InInit):
        def configure_callbacks(self):
            return [ButterflyMoECallback(num_experts=5, verbose=False)]

    module, trainer = fit(tmp_path, module=Brings(), strategy="bfmoe")
    assert {layer.settings["num_experts"] for _, layer in moe_layers(module)} == {5}
    assert trainer.strategy.callback is None
    with pytest.raises(ConfigError, match="given once"):
        fit(tmp_path, module=Brings(), strategy=ours(num_experts=4))


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
def test_it_swaps_before_callbacks_that_copy_the_model(average, tmp_path):
    module, trainer = fit(tmp_path, average(), strategy=ours(num_experts=4))
    assert isinstance(trainer.callbacks[0], ButterflyMoECallback)
    assert len(list(moe_layers(module))) == 2


def test_names_are_those_of_the_callback_and_clash_with_none_of_lightnings():
    strategy = set(inspect.signature(ButterflyMoEStrategy).parameters)
    assert set(callback_parameters()) <= strategy
    lightning = set(inspect.signature(DDPStrategy.__init__).parameters)
    torch_ddp = set(inspect.signature(DistributedDataParallel.__init__).parameters)
    assert not set(callback_parameters()) & (lightning | torch_ddp)
    assert not set(callback_parameters()) & set(ButterflyMoEStrategy.__init__.__kwdefaults__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_expert": 4}, "num_expert=4. Did you mean num_experts"),
        ({"compress": "fp8"}, "compress='fp8'. Use compress='bf16'"),
        ({"compress": "bf16", "ddp_comm_hook": print}, "one communication hook"),
        ({"freeze": True}, "freeze=True. Use freeze='factor'"),
        ({"check_replicas_every_n_steps": -1}, "check_replicas_every_n_steps must be an integer"),
    ],
)
def test_wrong_settings_are_refused_when_it_is_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        ButterflyMoEStrategy(**settings)


def test_several_processes_on_mps_are_refused():
    strategy = ours(parallel_devices=[torch.device("mps")] * 2)
    with pytest.raises(ConfigError, match="2 x 1 processes on MPS. Use devices=1"):
        strategy._configure_launcher()
    alone = ours(parallel_devices=[torch.device("mps")])
    alone._configure_launcher()
    assert alone.launcher is None


def test_one_device_of_a_larger_launch_is_refused(tmp_path, monkeypatch):
    """As DDP does: each process would train alone and nobody would say so."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"does not match the world size \(2\)"):
        fit(tmp_path, strategy=ours(), plugins=[TorchElasticEnvironment()])


class Freeze(L.Callback):
    """Sets requires_grad of all angles before a batch."""

    def __init__(self, at):
        self.at = at  # {batch: requires_grad}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx in self.at and trainer.current_epoch == 0:
            for name, role in parameter_roles(module).items():
                if role == "angle":
                    module.get_parameter(name).requires_grad_(self.at[batch_idx])


def test_a_change_while_gradients_accumulate_is_refused(tmp_path):
    settings = {"strategy": "bfmoe", "accumulate_grad_batches": 2}
    with pytest.raises(ReplicaError, match=r"a change of \d+ parameters \(net.0.mlp.*angles"):
        fit(tmp_path, Freeze({1: False}), **settings)
    module, _ = fit(tmp_path, Freeze({0: False, 2: True}), **settings)
    assert all(p.requires_grad for p in module.parameters())


class Latents(L.Callback):
    """Notes the latent matrices before each batch and whether they have a gradient."""

    def __init__(self):
        self.values, self.trainable, self.grads = [], [], []

    def of(self, module):
        return next(
            module.get_parameter(n) for n, r in parameter_roles(module).items() if r == "latent"
        )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.values.append(self.of(module).detach().clone())

    def on_train_batch_end(self, trainer, module, *_):
        self.trainable.append(self.of(module).requires_grad)
        self.grads.append(self.of(module).grad is not None)


@pytest.mark.parametrize("freeze", ["factor", "requires_grad"])
def test_latents_stand_still_in_the_first_phase(freeze, tmp_path):
    plan, seen = Plan(start=6, end=8, freeze_latents=4), Latents()
    strategy = ours(num_experts=4, plan=plan, freeze=freeze)
    module, _ = fit(tmp_path, seen, strategy=strategy)
    moved = [not torch.equal(seen.values[0], value) for value in seen.values]
    assert moved == [False] * 5 + [True] * 7
    frozen = freeze == "requires_grad"
    assert seen.trainable == [not frozen] * 4 + [True] * 8
    assert seen.grads == [not frozen] * 4 + [True] * 8
    assert all(p.requires_grad for p in module.parameters())


def test_what_the_user_froze_stays_frozen(tmp_path):
    module = InInit()
    swap_feed_forward(module, num_experts=2)
    latent = module.net[0].mlp.experts.up.substrate.latent.requires_grad_(False)
    before = latent.detach().clone()
    plan = Plan(start=6, end=8, freeze_latents=4)
    fit(tmp_path, module=module, strategy=ours(num_experts=2, plan=plan, freeze="requires_grad"))
    assert not latent.requires_grad and torch.equal(latent, before)


def test_a_training_stopped_in_the_frozen_phase_leaves_the_module_trainable(tmp_path):
    plan = Plan(start=100, end=200, freeze_latents=50)
    strategy = ours(num_experts=2, plan=plan, freeze="requires_grad", total_steps=200)
    with pytest.warns(UserWarning, match="ended at lambda"):
        module, _ = fit(tmp_path, strategy=strategy)
    assert all(p.requires_grad for p in module.parameters())


class TwoOptimizers(InInit):
    """Manual optimization that toggles: `requires_grad` changes within a step, and is put back."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[2])]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_toggling_within_a_step_is_no_change(tmp_path):
    with pytest.warns(UserWarning, match="total_steps=... the optimizer steps|ended at lambda"):
        module, trainer = fit(
            tmp_path,
            module=TwoOptimizers(),
            strategy=ours(num_experts=2, total_steps=100),
            max_steps=8,
        )
    assert trainer.global_step == 8 and trainer.strategy.callback.clock.step == 4
