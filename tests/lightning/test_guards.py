"""What a user can get wrong: each is an error that says what, and what to do."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_bfmoe import (
    ButterflyMoECallback,
    ButterflyMoEConfig,
    load_from_checkpoint,
    swap_feed_forward,
)
from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.errors import CheckpointError, ConfigError, SwapError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.layers.state import decode_extra_state
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import (
    Block,
    D,
    InConfigureModel,
    InInit,
    InSetup,
    Loader,
    NoBlock,
    assert_same_state,
    make_net,
    make_trainer,
)


def callback(**settings) -> ButterflyMoECallback:
    return ButterflyMoECallback(**{"num_experts": 4, "verbose": False, **settings})


class NoBlockInSetup(NoBlock):
    def setup(self, stage):
        self.more = nn.Linear(D, D)


class NoBlockInConfigureModel(NoBlock):
    def setup(self, stage):
        pass

    def configure_model(self):
        self.more = nn.Linear(D, D)


@pytest.mark.parametrize("kind", [NoBlock, NoBlockInSetup, NoBlockInConfigureModel])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_model_without_a_block_is_an_error_in_every_stage(kind, stage, tmp_path):
    module, trainer = kind(), make_trainer(tmp_path, callback())
    with pytest.raises(SwapError, match="must have a feed-forward block"):
        getattr(trainer, stage)(module, Loader())
    assert not {"setup", "configure_model"} & set(vars(module))


def test_a_wrong_pattern_names_what_is_there(tmp_path):
    trainer = make_trainer(tmp_path, callback(include="net.0.ffn"))
    with pytest.raises(SwapError, match=r"include='net.0.ffn'.*net\.0\.mlp"):
        trainer.fit(InInit(), Loader())


@pytest.mark.parametrize("kind", [InInit, InSetup, InConfigureModel])
def test_patterns_choose_blocks_wherever_they_are_built(kind, tmp_path):
    module = kind()
    make_trainer(tmp_path, callback(exclude=["net.1*"]), max_epochs=1).fit(module, Loader())
    assert [name for name, _ in moe_layers(module)] == ["net.0.mlp"]


def test_blocks_from_two_hooks_stand_in_one_report(tmp_path):
    class Both(InInit):
        def setup(self, stage):
            self.net.append(Block())
            self.net.append(nn.Linear(D, D))
            self.net[2] = nn.Linear(D, D)

    trainer = make_trainer(tmp_path, callback(), max_epochs=1)
    trainer.fit(Both(), Loader())
    paths = [block.path for block in trainer.callbacks[0].report.blocks]
    assert paths == ["net.0.mlp", "net.1.mlp", "net.3.mlp"]


def test_layers_that_are_rebuilt_in_every_stage_are_swapped_in_every_stage(tmp_path):
    class Rebuilds(InInit):
        def setup(self, stage):
            self.net = make_net()

    module, trainer = Rebuilds(), make_trainer(tmp_path, callback(), max_epochs=1)
    trainer.fit(module, Loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trained = {k: v.clone() for k, v in module.state_dict().items() if k.endswith("angles")}
    trainer.test(module, Loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert len(list(moe_layers(module))) == 2
    assert all(torch.equal(module.state_dict()[key], value) for key, value in trained.items())


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "average": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "pruning": lambda: ModelPruning("l1_unstructured", amount=0.1),
}


@pytest.mark.parametrize("name", AVERAGING)
def test_callbacks_that_copy_the_model_must_come_after_ours(name, tmp_path):
    other = AVERAGING[name]()
    trainer = make_trainer(tmp_path, other, callback())
    kind = type(other).__name__
    with pytest.raises(SwapError, match=rf"Write callbacks=\[ButterflyMoECallback.*{kind}"):
        trainer.fit(InInit(), Loader())


@pytest.mark.parametrize("name", AVERAGING)
def test_callbacks_that_copy_the_model_work_after_ours(name, tmp_path):
    class WithSetup(InInit):
        def setup(self, stage):
            pass

    module = WithSetup()
    trainer = make_trainer(tmp_path, callback(), AVERAGING[name](), max_epochs=3)
    trainer.fit(module, Loader(), Loader(seed=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=name != "swa")["state_dict"]
    assert decode_extra_state(state["net.0.mlp._extra_state"])["blend"] == 1.0
    assert "setup" not in vars(module)


def test_an_optimizer_built_before_the_swap_is_named(tmp_path):
    class Early(InInit):
        def __init__(self):
            super().__init__()
            self.early = [torch.optim.SGD(self.parameters(), lr=0.1)]

        def configure_optimizers(self):
            return self.early[0]

    trainer = make_trainer(tmp_path, callback())
    names = r"8 parameters .*net\.0\.mlp\.0\.weight.* 18 new ones .*net\.0\.mlp\.experts"
    with pytest.raises(SwapError, match=names):
        trainer.fit(Early(), Loader())


def test_parameters_that_no_optimizer_holds_are_named(tmp_path):
    class HeadOnly(InInit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    trainer = make_trainer(tmp_path, callback())
    with pytest.raises(SwapError, match=r"in none \(net\.0\.mlp\.experts.*freeze them"):
        trainer.fit(HeadOnly(), Loader())


def test_frozen_blocks_stay_frozen_and_need_no_optimizer(tmp_path):
    class Frozen(InInit):
        def __init__(self):
            super().__init__()
            self.net[:2].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    module = Frozen()
    make_trainer(tmp_path, callback(), max_epochs=1).fit(module, Loader())
    assert not any(p.requires_grad for _, layer in moe_layers(module) for p in layer.parameters())


def test_a_shared_block_stays_shared(tmp_path):
    class Shared(InInit):
        def __init__(self):
            super().__init__()
            self.net[1].mlp = self.net[0].mlp

    module = Shared()
    trainer = make_trainer(tmp_path, callback(), max_epochs=1)
    trainer.fit(module, Loader())
    assert module.net[1].mlp is module.net[0].mlp
    assert len(list(moe_layers(module))) == 1
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_same_state(load_from_checkpoint(Shared, tmp_path / "end.ckpt"), module)


def test_weights_with_nan_are_refused(tmp_path):
    module = InInit()
    module.net[0].mlp[0].weight.data[0, 0] = float("nan")
    with pytest.raises(SwapError, match=r"readable and finite.*net\.0\.mlp"):
        make_trainer(tmp_path, callback()).fit(module, Loader())


def test_weights_on_the_meta_device_are_refused(tmp_path):
    class Meta(InInit):
        def configure_model(self):
            if self.net is None:
                with torch.device("meta"):
                    self.net = make_net()

    module = Meta()
    module.net = None
    # Lightning's own teardown stumbles over the meta tensors and prints our error above its own
    with pytest.raises(NotImplementedError, match="meta tensor") as caught:
        make_trainer(tmp_path, callback()).fit(module, Loader())
    ours = caught.value.__context__
    assert isinstance(ours, SwapError) and "Materialise the weights, then swap" in str(ours)


def test_two_callbacks_share_a_model_when_each_has_a_name(tmp_path):
    first = callback(include="net.0.mlp", name="first", plan=Plan(start=0, end=0))
    second = callback(include="net.1.mlp", name="second", num_experts=2)
    module = InInit()
    trainer = make_trainer(tmp_path, first, second)
    trainer.fit(module, Loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert [layer.settings["num_experts"] for _, layer in moe_layers(module)] == [4, 2]
    stored = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert sorted(state["name"] for state in stored.values()) == ["first", "second"]
    make_trainer(tmp_path, first, second).test(InInit(), Loader(), ckpt_path=tmp_path / "end.ckpt")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_experts": 16}, r"num_experts=4 \(asked: 16\)"),
        ({"activation_bits": 8}, r"activation_bits=None \(asked: 8\)"),
    ],
)
def test_a_module_that_was_swapped_otherwise_keeps_its_layers_and_says_so(asked, message, tmp_path):
    module = InInit()
    make_trainer(tmp_path, callback(), max_epochs=1).fit(module, Loader())
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, callback(**asked)).test(module, Loader(), verbose=False)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, callback(), max_epochs=1)
    trainer.fit(InInit(), Loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = make_trainer(tmp_path, callback(gains=True))
    with pytest.raises(CheckpointError, match="gains: layer True, checkpoint False"):
        other.test(InInit(), Loader(), ckpt_path=tmp_path / "end.ckpt")


def test_loading_says_when_a_checkpoint_is_not_ours_or_does_not_fit(tmp_path):
    class Narrow(InInit):
        def __init__(self, lr=1e-2):
            super().__init__(lr)
            self.net = nn.Sequential(Block())

    class Wide(InInit):
        def __init__(self, lr=1e-2):
            super().__init__(lr)
            self.net[2] = nn.Linear(D, 30)

    dense, ours = tmp_path / "dense.ckpt", tmp_path / "ours.ckpt"
    for path, callbacks in ((dense, ()), (ours, (callback(),))):
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=1)
        trainer.fit(InInit(), Loader())
        trainer.save_checkpoint(path)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"none in 'dense.ckpt'. Use InInit.load_from"):
        load_from_checkpoint(InInit, dense)
    with pytest.raises(CheckpointError, match="net.1.mlp"):
        load_from_checkpoint(Narrow, ours)
    with pytest.raises(CheckpointError, match="size mismatch for net.2.weight"):
        load_from_checkpoint(Wide, ours)
    with pytest.raises(CheckpointError, match="a file that torch.load reads"):
        load_from_checkpoint(InInit, tmp_path / "text.ckpt")
    with pytest.raises(CheckpointError, match="has a state_dict"):
        load_from_checkpoint(InInit, tmp_path / "other.ckpt")


def test_settings_are_checked_when_the_callback_is_made():
    with pytest.raises(ConfigError, match="top_k must be at most num_experts"):
        ButterflyMoECallback(num_experts=2, top_k=3)
    with pytest.raises(ConfigError, match="from a config or from a preset"):
        ButterflyMoECallback(config=ButterflyMoEConfig(), preset="paper")
    with pytest.raises(ConfigError, match="angle_lr_factor must be"):
        ButterflyMoECallback(angle_lr_factor=0)
    config = ButterflyMoEConfig(num_experts=64, gains=True)
    assert ButterflyMoECallback(config=config, top_k=4).config.to_dict() == {
        **config.to_dict(),
        "top_k": 4,
    }


def test_every_setting_of_a_layer_is_a_keyword_of_the_callback():
    other = {
        "num_experts": 5, "top_k": 3, "init": "scratch", "angle_std": 0.3, "stages": 2,
        "gains": True, "scale": "absmean", "granularity": "tensor", "down": "dense",
        "activation_bits": 8, "activation": "relu", "dropout": 0.1, "balance_rate": 0.01,
        "switch_weight": 0.02, "z_weight": 0.03, "router_noise": 0.04, "correction_rank": 6,
        "seed": 7,
    }  # fmt: skip
    assert ButterflyMoECallback(**other).config.to_dict() == other


def test_deepspeed_is_refused(tmp_path):
    class DeepSpeedStrategy(L.pytorch.strategies.SingleDeviceStrategy):
        pass

    trainer = make_trainer(tmp_path, callback(), strategy=DeepSpeedStrategy(), devices="auto")
    with pytest.raises(SwapError, match="strategy DeepSpeedStrategy"):
        trainer.fit(InInit(), Loader())


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_spawning_strategies_are_refused_unless_the_module_is_swapped(strategy):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    module = InInit()
    with pytest.raises(SwapError, match="started from a swapped module: got strategy DDPStrategy"):
        guards.check_strategy(trainer, module)
    swap_feed_forward(module, num_experts=2)
    guards.check_strategy(trainer, module)


def test_a_training_that_ends_before_lambda_is_one_says_so():
    module = InInit()
    ours = ButterflyMoECallback(num_experts=2, verbose=False, total_steps=100)
    trainer = L.Trainer(max_steps=2, callbacks=[ours], logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="ended at lambda 0.000, after 2 of 100 planned steps"):
        trainer.fit(module, Loader(4))
