"""OrbitRecorder: the right angles at the right steps, a bounded file, resumes, ranks."""

import copy
import json
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_bfmoe import OrbitExplorer, OrbitRecorder
from lightning_bfmoe.errors import CheckpointError, ConfigError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.swap import swap_feed_forward
from lightning_bfmoe.viz import read_recording
from lightning_bfmoe.viz.snapshot import read_angles
from tests.lightning.modules import InInit, Loader, StopAt, assert_same_state, make_trainer

UP = ("net.0.mlp", "up/in")


def swapped(lr=1e-2, experts=4):
    torch.manual_seed(0)
    module = InInit(lr)
    swap_feed_forward(module, num_experts=experts, top_k=2, init="scratch")
    return module


class Spy(L.Callback):
    """Angles of one rotation, loss and load of every step."""

    def __init__(self):
        self.angles, self.losses, self.loads = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.layer = dict(moe_layers(pl_module))[UP[0]]
        self.angles.append(read_angles(self.layer.experts.up.rotate_in).numpy())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(pl_module.losses[-1])
        self.loads.append(self.layer.last_routing.load.numpy())
        if trainer.global_step == len(self.angles):
            self.angles.append(read_angles(self.layer.experts.up.rotate_in).numpy())


def fit(tmp_path, recorder, *others, module=None, batches=6, val=None, ckpt_path=None, **settings):
    trainer = make_trainer(tmp_path, recorder, *others, **{"max_epochs": 1, **settings})
    trainer.fit(module or swapped(), Loader(batches), val, ckpt_path=ckpt_path)
    return trainer


def test_records_are_angles_loads_and_losses(tmp_path):
    recorder, spy = OrbitRecorder(2), Spy()
    trainer = fit(
        tmp_path, recorder, spy, batches=10, accumulate_grad_batches=2, val=Loader(2),
        val_check_interval=4, limit_val_batches=1,
    )  # fmt: skip
    assert trainer.global_step == 5
    assert recorder.path == tmp_path / "orbits.safetensors"
    for recording in (recorder.recording, read_recording(recorder.path)):
        assert recording.steps == [0, 2, 4, 5]
        for i, step in enumerate(recording.steps):
            np.testing.assert_array_equal(recording.angles(*UP)[i], spy.angles[step])
        assert recording.layers == ["net.0.mlp", "net.1.mlp"]
        assert recording.rotations(UP[0]) == ["up/in", "up/out", "down/in", "down/out"]
        # two micro-batches a step
        for i, part in enumerate((slice(0, 0), slice(0, 4), slice(4, 8), slice(8, 10))):
            loads = np.sum([np.zeros(4), *spy.loads[part]], axis=0)
            assert recording.loads(UP[0])[i].tolist() == loads.tolist()
            if i:
                assert recording.losses[i] == pytest.approx(np.mean(spy.losses[part]), rel=1e-6)
        assert np.isnan(recording.losses[0])
    assert "val_loss" in recorder.recording.snapshots[-1].metrics
    assert OrbitExplorer(recorder.path).distances().shape == (4, 4)


def test_nothing_that_is_trained_changes(tmp_path):
    plain, recorded = swapped(), swapped()
    make_trainer(tmp_path).fit(plain, Loader(4))
    fit(tmp_path, OrbitRecorder(1), module=recorded, batches=4, max_epochs=2)
    assert_same_state(plain, recorded)
    assert all(not module._forward_hooks for module in recorded.modules())


def test_a_full_recording_is_thinned_and_its_interval_doubles(tmp_path):
    recorder, spy = OrbitRecorder(1, max_records=6), Spy()
    fit(tmp_path, recorder, spy, batches=19)
    recording = read_recording(recorder.path)
    assert recording.steps == [0, 8, 16, 19]
    assert recording.loads(UP[0]).sum(axis=0).tolist() == np.sum(spy.loads, axis=0).tolist()
    size = 2 * 4 * recorder.recording.snapshots[0].nbytes
    small = OrbitRecorder(1, filename="small", max_bytes=size // 2)
    fit(tmp_path, small, batches=19)
    assert sum(s.nbytes for s in small.recording.snapshots) <= size // 2
    assert small.recording.steps[0] == 0 and small.recording.steps[-1] == 19


def test_a_recording_that_cannot_be_small_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="four records fit into max_bytes=1000: got .* Choose"):
        fit(tmp_path, OrbitRecorder(max_bytes=1000))
    recorder = OrbitRecorder(max_bytes=1000, layers="net.0.*", rotations="up/in")
    fit(tmp_path, recorder)
    assert list(recorder.recording.widths) == [UP]


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_a_resumed_training_goes_on_with_the_file(tmp_path, stop):
    whole = OrbitRecorder(2, dirpath=str(tmp_path / "whole"))
    fit(tmp_path, whole, max_epochs=2)
    folder = str(tmp_path / "parts")
    first = OrbitRecorder(2, dirpath=folder)
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, first, StopAt(stop, checkpoint), max_epochs=2)
    torch.load(checkpoint, weights_only=True)
    second = OrbitRecorder(2, dirpath=folder)
    fit(tmp_path, second, max_epochs=2, ckpt_path=checkpoint)
    ours, theirs = read_recording(second.path), whole.recording
    assert ours.steps == theirs.steps
    np.testing.assert_array_equal(ours.angles(*UP), theirs.angles(*UP))
    np.testing.assert_array_equal(ours.loads(UP[0]), theirs.loads(UP[0]))
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-6)


def test_a_thinned_recording_stays_thin_after_a_resume(tmp_path):
    checkpoint = tmp_path / "stopped.ckpt"
    first = OrbitRecorder(1, dirpath=str(tmp_path), max_records=6)
    fit(tmp_path, first, StopAt(9, checkpoint), max_epochs=2)
    assert first.interval.every == 4
    again = OrbitRecorder(1, dirpath=str(tmp_path), max_records=6)
    fit(tmp_path, again, max_epochs=2, ckpt_path=checkpoint)
    assert again.interval.every == 4 and again.recording.steps == [0, 4, 8, 12]


def test_what_was_recorded_after_the_checkpoint_is_dropped(tmp_path):
    checkpoint = tmp_path / "early.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(checkpoint)

    recorder = OrbitRecorder(2, dirpath=str(tmp_path))
    trainer = make_trainer(tmp_path, recorder, Save(), max_epochs=1)
    trainer.fit(swapped(), Loader(7))
    assert recorder.recording.steps == [0, 2, 4, 6, 7]
    again = OrbitRecorder(2, dirpath=str(tmp_path))
    fit(tmp_path, again, max_epochs=1, batches=7, max_steps=5, ckpt_path=checkpoint)
    assert again.recording.steps == [0, 2, 4, 5]


def test_a_lost_file_is_said_and_the_training_goes_on(tmp_path):
    checkpoint = tmp_path / "stopped.ckpt"
    first = OrbitRecorder(2, dirpath=str(tmp_path / "gone"))
    fit(tmp_path, first, StopAt(4, checkpoint), max_epochs=2)
    first.path.unlink()
    again = OrbitRecorder(2, dirpath=str(tmp_path / "new"))
    with pytest.warns(UserWarning, match="found no recording at .*gone.*before step 4"):
        fit(tmp_path, again, max_epochs=2, ckpt_path=checkpoint)
    assert again.recording.steps == [6, 8, 10, 12]


def test_a_file_of_another_model_is_an_error(tmp_path):
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, OrbitRecorder(2, dirpath=str(tmp_path)), StopAt(4, checkpoint), max_epochs=2)
    fit(tmp_path, OrbitRecorder(2, dirpath=str(tmp_path)), module=swapped(experts=5))
    with pytest.raises(CheckpointError, match="all records of a recording come from one model"):
        again = OrbitRecorder(2, dirpath=str(tmp_path))
        fit(tmp_path, again, max_epochs=2, ckpt_path=checkpoint)


def test_a_second_training_replaces_the_first(tmp_path):
    recorder = OrbitRecorder(3)
    fit(tmp_path, recorder)
    fit(tmp_path, recorder, batches=4)
    assert read_recording(recorder.path).steps == [0, 3, 4]


def test_the_file_lies_in_the_folder_of_the_logger(tmp_path):
    recorder = OrbitRecorder(3, filename="o")
    trainer = fit(tmp_path, recorder, logger=CSVLogger(tmp_path, "run"))
    assert str(recorder.path) == f"{trainer.log_dir}/o.safetensors" and recorder.path.is_file()


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch):
    recorder = OrbitRecorder(2)

    def fail(self, path):
        raise OSError("no space left")

    monkeypatch.setattr("lightning_bfmoe.viz.recording.Recording.write", fail)
    with pytest.warns(UserWarning, match="OrbitRecorder cannot write .*: no space left") as found:
        fit(tmp_path, recorder)
    assert sum("cannot write" in str(w.message) for w in found) == 1
    assert recorder.recording.steps == [0, 2, 4, 6]


def test_no_trace_in_barebones_and_no_file_in_a_dry_run(tmp_path):
    module = swapped()
    fit(tmp_path / "a", OrbitRecorder(1), module=module, barebones=True)
    fit(tmp_path / "b", OrbitRecorder(1), fast_dev_run=True)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_it_can_be_copied_and_says_when_there_is_nothing(tmp_path):
    recorder = OrbitRecorder(2)
    with pytest.raises(ConfigError, match="once a training has started"):
        _ = recorder.recording
    fit(tmp_path, recorder)
    for twin in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert twin.recording.steps == [0, 2, 4, 6]
    loaded = OrbitRecorder(2)
    loaded.load_state_dict(recorder.state_dict())  # as of a training in other processes
    assert loaded.recording.steps == [0, 2, 4, 6]


class OnRank(InInit):
    def train_dataloader(self):
        return Loader(4, seed=self.trainer.global_rank)


class Report(L.Callback):
    def __init__(self, recorder, path):
        self.recorder, self.path = recorder, path

    def on_train_end(self, trainer, pl_module):
        steps = [self.recorder.interval.every, self.recorder.interval.clock.step]
        (self.path / f"rank{trainer.global_rank}.json").write_text(json.dumps(steps))


def test_two_processes_write_one_recording(tmp_path):
    recorder = OrbitRecorder(1, max_records=4)
    module = OnRank(lr=0.0)
    swap_feed_forward(module, num_experts=4, top_k=2, balance_rate=0.0)
    make_trainer(
        tmp_path, recorder, Report(recorder, tmp_path), strategy="ddp_fork", devices=2, max_epochs=1
    ).fit(module)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    recording = read_recording(tmp_path / "orbits.safetensors")
    assert recording.steps[0] == 0 and recording.steps[-1] == 4
    assert recording.loads(UP[0]).sum() == 2 * 4 * 4 * 2  # ranks, steps, tokens, k


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1"),
        ({"max_records": 3}, "max_records - 3 must be an integer >= 1"),
        ({"max_bytes": 0}, "max_bytes must be an integer >= 1"),
    ],
)
def test_bad_settings_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        OrbitRecorder(**settings)


def test_no_layer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="InInit with 0 of them"):
        fit(tmp_path, OrbitRecorder(1), module=InInit())
