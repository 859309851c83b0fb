"""`PackedCheckpoint` writes what it says, when it says, and leaves the training as it is."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_bfmoe import (
    ButterflyMoECallback,
    PackedCheckpoint,
    inspect_packed,
    load_packed,
    pack,
)
from lightning_bfmoe.deploy import writer
from lightning_bfmoe.errors import CheckpointError, ConfigError, PackedFileError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import (
    InInit,
    Loader,
    NoBlock,
    StopAt,
    assert_same_state,
    make_trainer,
)

EARLY = Plan(start=0, end=4)  # steps; an epoch has 6


class Scripted(InInit):
    """Logs the values that it is given, one a validation."""

    def __init__(self, values=(3.0, 1.0, 2.0)):
        super().__init__()
        self.values = list(values)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.log("score", self.values[self.trainer.current_epoch])


def swapper(plan=EARLY, **settings):
    return ButterflyMoECallback(num_experts=3, plan=plan, verbose=False, **settings)


def fit(tmp_path, module, *callbacks, ckpt=None, epochs=3, loaders=True, **settings):
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=epochs, **settings)
    validation = Loader(2, seed=1) if loaders else None
    trainer.fit(module, Loader(), validation, ckpt_path=ckpt)
    return trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def bytes_of(model, tmp_path, **settings):
    pack(model, tmp_path / "expected.bfmoe", **settings)
    data = (tmp_path / "expected.bfmoe").read_bytes()
    (tmp_path / "expected.bfmoe").unlink()
    return data


@pytest.mark.parametrize("plan", [EARLY, Plan(start=0, end=999)], ids=["ternary", "half"])
def test_the_training_is_the_same_bit_for_bit(plan, tmp_path):
    modules = []
    for callbacks in ([], [PackedCheckpoint(monitor="val_loss", save_last=True, finalize=True)]):
        torch.manual_seed(0)
        modules.append(InInit())
        trainer = fit(
            tmp_path,
            modules[-1],
            swapper(plan, router_noise=0.1, evaluate_ternary=True),
            *callbacks,
        )
    assert modules[0].losses == modules[1].losses
    assert_same_state(*modules)
    assert modules[0].training == modules[1].training
    one, two = (m.optimizers().optimizer.state_dict()["state"] for m in modules)
    assert all(torch.equal(one[k]["exp_avg"], two[k]["exp_avg"]) for k in one)
    assert names(tmp_path / "packed") == ["model-best.bfmoe", "model-last.bfmoe"]
    assert trainer.global_step == 18


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 0)])
def test_the_best_and_the_last_model(mode, best, tmp_path):
    class Keep(PackedCheckpoint):
        def on_validation_end(self, trainer, pl_module):
            kept.append(bytes_of(pl_module, tmp_path, angles="int8"))
            super().on_validation_end(trainer, pl_module)

    kept = []
    packed = Keep(monitor="score", mode=mode, save_last=True, angles="int8")
    module = Scripted()
    fit(tmp_path, module, swapper(), packed)
    assert packed.best_path.read_bytes() == kept[best]
    assert packed.last_path.read_bytes() == kept[2] == bytes_of(module, tmp_path, angles="int8")
    assert packed.best_value == module.values[best]
    assert inspect_packed(packed.best_path).layers[0].record.angles == "int8"
    loaded, (x, _) = load_packed(packed.last_path, InInit()), Loader().data[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), load_packed(packed.last_path, InInit())(x))
    assert len(list(moe_layers(loaded))) == 2


def test_it_waits_for_lambda_one_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    packed = PackedCheckpoint(monitor="score")
    fit(tmp_path, Scripted([0.0, 2.0, 3.0]), swapper(Plan(start=0, end=10)), packed)
    assert packed.best_value == 2.0  # the value of the half-ternary model does not count
    assert packed.last_path is None
    assert sum("PackedCheckpoint waits: lambda is 0." in text for text in caplog.messages) == 1
    assert names(tmp_path / "packed") == ["model-best.bfmoe"]


@pytest.mark.parametrize("evaluate_ternary", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_what_evaluation_lends_is_not_lambda(evaluate_ternary, first, tmp_path):
    packed = PackedCheckpoint(monitor="val_loss")
    swap = swapper(Plan(start=0, end=99), evaluate_ternary=evaluate_ternary)
    callbacks = [packed, swap] if first else [swap, packed]
    with pytest.warns(UserWarning, match=r"wrote no file: at the end lambda was 0\."):
        fit(tmp_path, InInit(), *callbacks)
    assert names(tmp_path / "packed") == []


def test_finalize_packs_at_once_and_warns_when_another_function_was_measured(tmp_path):
    plan = Plan(start=0, end=99)
    packed = PackedCheckpoint(monitor="score", finalize=True)
    with pytest.warns(UserWarning, match="was measured at 0"):
        fit(tmp_path, Scripted(), swapper(plan), packed)
    assert packed.best_value == 1.0
    module, other = Scripted(), PackedCheckpoint("elsewhere", save_last=True, finalize=True)
    other.dirpath = str(tmp_path / "elsewhere")
    fit(tmp_path, module, swapper(plan, evaluate_ternary=True), other)
    assert other.last_path.read_bytes() == bytes_of(module, tmp_path, finalize=True)
    assert module.net[0].mlp.blend < 1


def test_a_resumed_training_goes_on_with_its_files(tmp_path):
    def callbacks():
        return swapper(), PackedCheckpoint(monitor="score", save_last=True)

    whole, ckpt = Scripted(), tmp_path / "stop.ckpt"
    torch.manual_seed(0)
    whole = Scripted()
    one = callbacks()
    fit(tmp_path / "whole", whole, *one)
    torch.manual_seed(0)
    part, two = Scripted(), callbacks()
    fit(tmp_path / "part", part, *two, StopAt(14, ckpt))  # in epoch 2: the best is written
    resumed, three = Scripted(), callbacks()
    fit(tmp_path / "part", resumed, *three, ckpt=ckpt)
    assert_same_state(whole, resumed)
    assert names(tmp_path / "part" / "packed") == ["model-best.bfmoe", "model-last.bfmoe"]
    assert three[1].best_value == one[1].best_value == 1.0
    for kind in ("best_path", "last_path"):
        assert getattr(three[1], kind).read_bytes() == getattr(one[1], kind).read_bytes()
    three[1].best_path.unlink()
    with pytest.warns(UserWarning, match="is gone"):
        fit(tmp_path / "part", Scripted(), *(last := callbacks()), ckpt=ckpt)
    assert last[1].best_value == 2.0


def test_a_new_training_keeps_the_files_of_an_older_one(tmp_path):
    fit(tmp_path, Scripted(), swapper(), PackedCheckpoint(), epochs=1)
    before = (tmp_path / "packed" / "model-last.bfmoe").read_bytes()
    again = PackedCheckpoint()
    fit(tmp_path, Scripted(), swapper(), again, epochs=1)
    assert again.last_path.name == "model-last-v1.bfmoe"
    assert (tmp_path / "packed" / "model-last.bfmoe").read_bytes() == before


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    packed = PackedCheckpoint(monitor="score", save_last=True)
    fit(tmp_path, Scripted(), swapper(), packed)
    assert packed.best_value == 1.0 and packed.report is None
    assert names(tmp_path / "packed") == []


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    packed, written = PackedCheckpoint(), []

    def full(tensor):
        if packed.last_path is None:
            return original(tensor)
        written.append(packed.last_path.read_bytes())
        raise OSError("disk full")

    original = writer.tensor_bytes
    monkeypatch.setattr(writer, "tensor_bytes", full)
    with pytest.raises(PackedFileError, match="disk full"):
        fit(tmp_path, Scripted(), swapper(), packed)
    assert names(tmp_path / "packed") == ["model-last.bfmoe"]
    assert packed.last_path.read_bytes() == written[0]
    load_packed(packed.last_path, InInit())


def test_an_average_is_what_is_packed(tmp_path):
    module, packed = InInit(), PackedCheckpoint()
    average = EMAWeightAveraging(decay=0.5)
    fit(tmp_path, module, swapper(), average, packed)
    assert packed.last_path.read_bytes() == bytes_of(module, tmp_path)  # which got the average


def test_without_validation_a_value_of_the_training_will_do(tmp_path):
    class Logs(InInit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    packed = PackedCheckpoint(monitor="train_loss", save_last=True)
    fit(tmp_path, Logs(), swapper(), packed, loaders=False, limit_val_batches=0)
    assert packed.best_path.exists() and packed.last_path.exists()


def test_a_nan_is_never_the_best_and_a_dry_run_writes_nothing(tmp_path):
    packed = PackedCheckpoint(monitor="score")
    fit(tmp_path, Scripted([float("nan"), 5.0, float("nan")]), swapper(), packed)
    assert packed.best_value == 5.0
    quick = PackedCheckpoint(str(tmp_path / "quick"), monitor="score")
    fit(tmp_path, Scripted(), swapper(), quick, fast_dev_run=True)
    assert names(tmp_path / "quick") == []


@pytest.mark.parametrize(
    ("module", "callbacks", "match"),
    [
        (NoBlock, [PackedCheckpoint()], "NoBlock without one"),
        (InInit, [swapper(), PackedCheckpoint(monitor="val_los")], "val_los', logged: val_loss"),
        (InInit, [swapper(), PackedCheckpoint(), PackedCheckpoint(mode="max")], "files of its own"),
    ],
)
def test_what_cannot_be_packed_is_said_when_the_training_starts(module, callbacks, match, tmp_path):
    for number, callback in enumerate(callbacks[2:]):
        callback.__class__ = type(f"Other{number}", (PackedCheckpoint,), {})
    with pytest.raises(ConfigError, match=match):
        fit(tmp_path, module(), *callbacks)
    assert names(tmp_path / "packed") == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "best"}, "min or max"),
        ({"save_last": False}, "something is saved"),
        ({"filename": "a/b"}, "without a folder"),
        ({"angles": "int2"}, "angles must be one of"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(ConfigError, match=match):
        PackedCheckpoint(**settings)


def test_a_state_of_another_version_is_refused():
    with pytest.raises(CheckpointError, match="has version 1: got 7"):
        PackedCheckpoint().load_state_dict({"version": 7})
