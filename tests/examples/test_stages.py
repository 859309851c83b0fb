"""Stages: run once, reused for the same inputs only, and nothing half-written is ever left."""

import json

import pytest

from examples import stages as stages_file
from examples.stages import Stages


@pytest.fixture
def counted():
    """Work that counts its calls and writes one file."""

    def work(folder):
        work.calls += 1
        (folder / "model.bin").write_bytes(b"weights")
        return {"loss": 1.5}

    work.calls = 0
    return work


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_stage_runs_once(tmp_path, counted):
    first = Stages(tmp_path).run("base", {"steps": 3}, counted)
    second = Stages(tmp_path).run("base", {"steps": 3}, counted)
    assert counted.calls == 1
    assert first == second
    assert second["loss"] == 1.5
    assert names(tmp_path) == ["base", "model.bin", "record.json"]


def test_other_inputs_or_fresh_run_it_again(tmp_path, counted):
    Stages(tmp_path).run("base", {"steps": 3}, counted)
    Stages(tmp_path).run("base", {"steps": 4}, counted)
    assert counted.calls == 2
    Stages(tmp_path, fresh=True).run("base", {"steps": 4}, counted)
    assert counted.calls == 3


def test_other_source_code_runs_it_again(tmp_path, counted, monkeypatch):
    Stages(tmp_path).run("base", {}, counted)
    monkeypatch.setattr(stages_file, "source_hash", lambda: "edited")
    Stages(tmp_path).run("base", {}, counted)
    assert counted.calls == 2


def test_the_source_hash_sees_every_file(tmp_path, monkeypatch):
    for folder in ("lightning_bfmoe", "examples"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(stages_file, "ROOT", tmp_path)
    hashes = {stages_file.source_hash()}
    (tmp_path / "examples" / "a.py").write_text("x = 2\n")
    hashes.add(stages_file.source_hash())
    (tmp_path / "lightning_bfmoe" / "b.py").write_text("")
    hashes.add(stages_file.source_hash())
    assert len(hashes) == 3


@pytest.mark.parametrize("damage", [b"weight", b"", None])
def test_a_damaged_file_runs_it_again(tmp_path, counted, damage):
    Stages(tmp_path).run("base", {}, counted)
    if damage is None:
        (tmp_path / "base" / "model.bin").unlink()
    else:
        (tmp_path / "base" / "model.bin").write_bytes(damage)
    Stages(tmp_path).run("base", {}, counted)
    assert counted.calls == 2
    assert (tmp_path / "base" / "model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "{broken"])
def test_a_damaged_record_runs_it_again(tmp_path, counted, text):
    Stages(tmp_path).run("base", {}, counted)
    (tmp_path / "base" / "record.json").write_text(text)
    Stages(tmp_path).run("base", {}, counted)
    assert counted.calls == 2
    assert json.loads((tmp_path / "base" / "record.json").read_text())["loss"] == 1.5


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_stage_leaves_the_finished_ones_and_nothing_else(tmp_path, counted, stop):
    stages = Stages(tmp_path)
    stages.run("base", {}, counted)

    def interrupted(folder):
        (folder / "half.bin").write_bytes(b"ha")
        raise stop("stopped")

    with pytest.raises(stop, match="stopped"):
        stages.run("moe", {}, interrupted)
    with pytest.raises(stop, match="stopped"):
        stages.run("base", {"steps": 9}, interrupted)
    assert names(tmp_path) == ["base", "model.bin", "record.json"]
    assert stages.finished("base", {}) is not None
