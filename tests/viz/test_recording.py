"""Recordings: what a snapshot holds, the file, thinning, and errors that say what is wrong."""

import math
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lightning_bfmoe.errors import CheckpointError, ConfigError
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE, Rotation
from lightning_bfmoe.viz import Recording, Snapshot, read_recording, record_model
from lightning_bfmoe.viz.snapshot import find_rotations, read_angles

KEY = ("mlp", "up/in")


def make_snapshot(step: int, loss: float = 1.0, experts: int = 2) -> Snapshot:
    angles = np.full((experts, 3, 4), step / 100, dtype=np.float16)
    return Snapshot(step, {KEY: angles}, {"mlp": np.arange(experts)}, loss, {"val_loss": loss})


def make_recording(steps: int) -> Recording:
    return Recording({KEY: 8}, [make_snapshot(10 * i, float(i)) for i in range(steps)])


def test_a_model_is_recorded_as_it_is():
    model = torch.nn.ModuleDict({"a": ButterflyMoE(8, 12, num_experts=3, gated=True), "b": None})
    recording = record_model(model, step=7)
    assert recording.steps == [7] and recording.layers == ["a"]
    roles = [f"{m}/{side}" for m in ("up", "gate", "down") for side in ("in", "out")]
    assert recording.rotations("a") == roles
    linears = model["a"].experts.linears()
    for role in roles:
        matrix, side = role.split("/")
        rotation = getattr(linears[matrix], f"rotate_{side}")
        found = recording.angles("a", role)[0]
        np.testing.assert_allclose(found, rotation.angles.detach().numpy(), atol=1e-3)
        assert recording.widths["a", role] == rotation.d


def test_parts_of_a_model_can_be_recorded():
    assert list(find_rotations(Rotation(8, 2))) == [("model", "rotation")]
    linear = ButterflyLinear(8, 12, 2)
    assert {k: d for k, (_, d) in find_rotations(linear).items()} == {
        ("model", "in"): 8,
        ("model", "out"): 12,
    }
    model = torch.nn.Sequential(ButterflyMoE(8, 12), ButterflyMoE(8, 12))
    assert list(find_rotations(model, "1", ["up/*"])) == [("1", "up/in"), ("1", "up/out")]


def test_angles_are_wrapped_before_they_are_rounded():
    rotation = Rotation(4, 1)
    rotation.angles.data.fill_(40 * np.pi + 0.25)
    assert read_angles(rotation).unique().tolist() == pytest.approx([0.25], abs=1e-3)


def test_a_file_holds_everything_exactly(tmp_path):
    recording = make_recording(4)
    recording.snapshots[0] = make_snapshot(0, math.nan)
    recording.snapshots[0].metrics.clear()
    read = read_recording(recording.write(tmp_path / "new" / "orbits.safetensors"))
    assert read.steps == recording.steps and read.widths == recording.widths
    assert math.isnan(read.losses[0]) and read.losses[1:] == recording.losses[1:]
    assert [dict(s.metrics) for s in read.snapshots] == [
        dict(s.metrics) for s in recording.snapshots
    ]
    np.testing.assert_array_equal(read.angles(*KEY), recording.angles(*KEY))
    np.testing.assert_array_equal(read.loads("mlp"), recording.loads("mlp"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["orbits.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make_recording(2).write(tmp_path / "orbits.safetensors")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_recording(3).write(path)
    assert read_recording(path).steps == [0, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["orbits.safetensors"]


@pytest.mark.parametrize(("count", "steps"), [(5, [0, 20, 40]), (6, [0, 20, 40, 50])])
def test_thinning_keeps_ends_and_token_slots(count, steps):
    recording = make_recording(count)
    slots = recording.loads("mlp")[1:].sum(axis=0)
    recording.thin()
    assert recording.steps == steps
    assert recording.loads("mlp")[1:].sum(axis=0).tolist() == slots.tolist()
    assert recording.losses[1] == 1.5  # of 1 and 2


def test_a_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="OrbitRecorder.path says"):
        read_recording(tmp_path / "no.safetensors")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"no file of ours")
    with pytest.raises(CheckpointError, match="is a recording of format 1: got SafetensorError"):
        read_recording(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="got ValueError: format None"):
        read_recording(path)
    whole = make_recording(2).write(tmp_path / "ok.safetensors").read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="is a recording of format 1"):
        read_recording(path)


def test_errors_say_what_there_is():
    with pytest.raises(ConfigError, match="rotation 'up'.*Layers: .'mlp'.; rotations: .'up/in'."):
        make_recording(1).angles("mlp", "up")
    with pytest.raises(CheckpointError, match="all records .* step 30 with other layers"):
        make_recording(2).append(make_snapshot(30, experts=3))
    with pytest.raises(ConfigError, match="Linear with 0 of them"):
        record_model(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="ButterflyMoE with 4 of them: model up/in"):
        record_model(ButterflyMoE(8, 12), rotations="gate/*")
