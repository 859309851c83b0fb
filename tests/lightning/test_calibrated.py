"""`ButterflyMoECallback(init="calibrated")`: a calibrated swap inside an existing Trainer's fit."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bfmoe import ButterflyMoECallback, Calibration, load_from_checkpoint, pack
from lightning_bfmoe.errors import CalibrationError, ConfigError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.plan import Plan
from lightning_bfmoe.strategy import parameter_checksums
from tests.lightning.modules import (
    MODULES,
    PLACES,
    D,
    InInit,
    Loader,
    StopAt,
    WithData,
    assert_same_state,
    make_trainer,
    state_of,
)
from tests.lightning.processes import run_ranks, two_processes

SMALL = {"num_experts": 4, "verbose": False}


def ours(**changes):
    settings = {"init": "calibrated", "calibration_batches": 10, **SMALL, **changes}
    return ButterflyMoECallback(**settings)


def data(batches=12, size=16):
    return Loader(batches, size)


class AtStart(Callback):
    """What the module computes and holds when the training begins."""

    def __init__(self, probe):
        self.probe, self.output, self.held = probe, None, None

    def on_train_start(self, trainer, module):
        module.eval()
        with torch.no_grad():
            self.output = module(self.probe)
        module.train()
        self.held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        trainer.should_stop = True


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("place", PLACES)
def test_training_begins_nearer_to_the_dense_module_than_after_a_naive_swap(place, tmp_path):
    probe = torch.randn(200, D, generator=torch.Generator().manual_seed(3))
    found = {}
    for init in ("calibrated", "preserve"):
        torch.manual_seed(1)
        module = MODULES[place]()
        dense = InInit()
        ternary = Plan(start=0, end=0)
        callback = ours() if init == "calibrated" else ButterflyMoECallback(plan=ternary, **SMALL)
        seen = AtStart(probe)
        if place == "init":
            dense.net = copy.deepcopy(module.net)
        trainer = make_trainer(tmp_path, callback, seen, max_epochs=1, limit_train_batches=1)
        torch.manual_seed(1)
        trainer.fit(module, data())
        if place != "init":
            torch.manual_seed(1)
            dense = InInit()
        with torch.no_grad():
            found[init] = distance(seen.output, dense(probe))
        mine = {id(p) for _, layer in moe_layers(module) for p in layer.parameters()}
        assert mine <= seen.held
        assert "configure_optimizers" not in vars(module)
    assert found["calibrated"] < 0.7 * found["preserve"]


def test_the_report_and_the_plan_tell_of_it(tmp_path, capsys):
    callback = ours(verbose=True)
    assert callback.plan == Plan(start=0, end=0, freeze_latents=0.5)
    assert ours(plan=Plan(start=3, end=5)).plan == Plan(start=3, end=5)
    module = InInit()
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    latents = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            layer = module.net[0].mlp
            latents[trainer.global_step] = layer.experts.up.substrate.latent.detach().clone()
            assert layer.blend == 1.0

    trainer.callbacks.append(Watch())
    trainer.fit(module, data())
    assert torch.equal(latents[1], latents[12]) and not torch.equal(latents[12], latents[24])
    blocks = callback.report.calibration.blocks
    assert [block.path for block in blocks] == ["net.0.mlp", "net.1.mlp"]
    assert blocks[0].tokens == 8 * 16 and blocks[0].held_tokens == 2 * 16
    assert not callback.report.receipts
    trits = latents[1].sign()
    assert ((latents[1] - trits * latents[1].abs().amax(1, keepdim=True)).abs() < 1e-6).all()


def test_what_the_training_reads_and_draws_is_as_without_it(tmp_path):
    x, y = torch.randn(96, D), torch.randint(3, (96,))
    order = []
    for callback in (ours(plan=Plan(start=0, end=0)), ButterflyMoECallback(**SMALL)):
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, _):
                seen.append(batch[1].clone())  # noqa: B023

        torch.manual_seed(5)
        module = InInit()
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        make_trainer(tmp_path, callback, Watch(), max_epochs=1).fit(module, loader)
        order.append(torch.cat(seen))
    assert torch.equal(*order)
    loader = data()
    make_trainer(tmp_path, ours(), max_epochs=1).fit(InInit(), loader)
    assert loader.at == 12  # one epoch: the calibration has put it back


def test_a_resumed_training_is_not_calibrated_again(tmp_path):
    first = InInit()
    make_trainer(tmp_path, ours(), StopAt(5, tmp_path / "a.ckpt")).fit(first, data())
    reads = []
    module = InInit()

    def forward(model, batch):
        reads.append(1)

    callback = ours(calibration=Calibration(forward_fn=forward))
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
    assert not reads and trainer.global_step == 24
    whole = InInit()
    torch.manual_seed(0)
    assert callback._swapper.held is None
    loaded = load_from_checkpoint(InInit, tmp_path / "a.ckpt")
    make_trainer(tmp_path, ours()).fit(whole, data(), ckpt_path=tmp_path / "a.ckpt")
    assert_same_state(whole, module)
    assert loaded.net[0].mlp.experts.up.bias is not None


def test_a_calibrated_module_is_packed(tmp_path):
    module = InInit()
    make_trainer(tmp_path, ours(), max_epochs=1).fit(module, data())
    pack(module.net, tmp_path / "m.bfmoe")


def test_validation_before_fit_is_calibrated_in_fit(tmp_path):
    module, callback = InInit(), ours()
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.validate(module, data(2), verbose=False)
    assert callback.report.calibration is None
    trainer.fit(module, data())
    assert callback.report.calibration is not None


@pytest.mark.parametrize("batch", [3, 14])
def test_an_interrupted_calibration_leaves_the_module_dense(batch, tmp_path):
    module = InInit()
    before, modules = state_of(module), list(module.named_modules())
    count = 0

    def forward(model, batch_):
        nonlocal count
        count += 1
        if count == batch:
            raise MemoryError("stop here")
        model(batch_[0])

    callback = ours(calibration=Calibration(forward_fn=forward))
    with pytest.raises(CalibrationError, match="stop here"):
        make_trainer(tmp_path, callback).fit(module, data())
    assert list(module.named_modules()) == modules
    after = state_of(module)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert "configure_optimizers" not in vars(module)
    make_trainer(tmp_path, ours(), max_epochs=1).fit(module, data())  # it can be tried again
    assert len(list(moe_layers(module))) == 2


class Named(Loader):
    """Batches that the module's forward does not take."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield {"inputs": x, "labels": y}


class FromNamed(InInit):
    def loss(self, batch):
        return super().loss((batch["inputs"], batch["labels"]))


def feed(module, batch):
    module(batch["inputs"])


def test_a_loader_that_forward_does_not_take_says_how_to_feed_it(tmp_path):
    with pytest.raises(CalibrationError, match=r"calibration=Calibration\(forward_fn=lambda"):
        make_trainer(tmp_path, ours()).fit(FromNamed(), Named(12, 16))
    callback = ours(calibration=Calibration(forward_fn=feed))
    make_trainer(tmp_path, callback, max_epochs=1).fit(FromNamed(), Named(12, 16))
    assert callback.report.calibration.blocks[0].tokens == 8 * 16


def test_data_that_can_be_read_once_only_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="gives each batch once"):
        make_trainer(tmp_path, ours()).fit(InInit(), iter(data()))


class Both(InInit):
    """Two loaders at once."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + self.loss(batch["b"])


def test_several_loaders_and_a_datamodule(tmp_path):
    callback = ours(calibration=Calibration(forward_fn=lambda m, batch: m(batch["a"][0])))
    make_trainer(tmp_path, callback, max_epochs=1).fit(Both(), {"a": data(), "b": data(6)})
    assert callback.report.calibration.blocks[0].tokens == 8 * 16

    class Module(L.LightningDataModule):
        def train_dataloader(self):
            return data()

    callback = ours()
    make_trainer(tmp_path, callback, max_epochs=1).fit(InInit(), datamodule=Module())
    assert callback.report.calibration.blocks[0].tokens == 8 * 16
    make_trainer(tmp_path, ours(), max_epochs=1, strategy="bfmoe").fit(WithData())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_follows_the_trainers_precision(precision, tmp_path):
    module, callback = InInit(), ours()
    make_trainer(tmp_path, callback, max_epochs=1, precision=precision).fit(module, data())
    assert callback.report.calibration.blocks[0].error < 0.6


def test_averages_begin_at_the_calibrated_layers(tmp_path):
    class Compare(Callback):
        def on_train_start(self, trainer, module):
            average = trainer.callbacks[1]._average_model.module
            for (_, ours), (_, theirs) in zip(moe_layers(module), moe_layers(average), strict=True):
                for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                    assert torch.equal(a, b)
            trainer.compared = True

    trainer = make_trainer(tmp_path, ours(), WeightAveraging(), Compare(), max_epochs=1)
    trainer.fit(InInit(), data())
    assert trainer.compared


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"calibration_batches": 4}, "go with init='calibrated'"),
        ({"calibration": Calibration()}, "go with init='calibrated'"),
        ({"init": "calibrated", "calibration_batches": 1}, "at least 2, some of which judge"),
        ({"init": "calibrated", "preset": "paper"}, "scale='lstsq'"),
        ({"init": "calibrated", "calibration": {"router": "best"}}, "router must be"),
    ],
)
def test_settings_that_do_not_go_together(settings, match):
    with pytest.raises((ConfigError, CalibrationError), match=match):
        ButterflyMoECallback(**settings)


def test_settings_may_be_plain_data():
    plain = {"max_batches": 7, "recipe": {"sweeps": 1, "bases": ["identity"]}}
    settings = ours(calibration=plain, calibration_batches=None)._calibrator.settings
    assert (settings.max_batches, settings.recipe.sweeps) == (7, 1)


def train_on(folder, strategy, fails=False):
    """Checksums after calibration and training, on a process whose own data differ."""
    torch.manual_seed(1)
    module = InInit()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    settings = Calibration(forward_fn=no_forward) if fails else None
    seen = AtStart(torch.ones(3, D))
    callback = ours(calibration=settings)
    trainer = make_trainer(
        folder, callback, seen, devices=2, strategy=strategy, use_distributed_sampler=False
    )
    before = state_of(module)
    try:
        trainer.fit(module, Loader(12, 16, seed=rank))
    except CalibrationError as error:
        same = all(torch.equal(before[k], v) for k, v in state_of(module).items())
        return str(error), same, len(list(moe_layers(module)))
    calibrated = callback.report.calibration is not None
    return parameter_checksums(module).tolist(), seen.output.tolist(), calibrated


def no_forward(module, batch):
    raise RuntimeError("no such input")


class TestProcesses:
    """Two gloo processes."""

    pytestmark = two_processes

    @pytest.mark.parametrize("strategy", ["ddp", "bfmoe"])
    def test_all_hold_what_the_first_one_found(self, strategy, tmp_path):
        first, second = run_ranks(train_on, tmp_path, tmp_path, strategy)
        assert first[:2] == second[:2]
        assert first[2] and not second[2]

    def test_a_failure_on_the_first_is_told_on_all(self, tmp_path):
        first, second = run_ranks(train_on, tmp_path, tmp_path, "ddp", True)
        assert "no such input" in first[0] and "the first process calibrates for all" in second[0]
        assert "no such input" in second[0]
        assert first[1:] == second[1:] == (True, 0)


def test_a_head_that_is_no_block_is_left_alone(tmp_path):
    module = InInit()
    make_trainer(tmp_path, ours(include="net.0.mlp"), max_epochs=1).fit(module, data())
    assert [name for name, _ in moe_layers(module)] == ["net.0.mlp"]
    assert isinstance(module.net[2], nn.Linear)
