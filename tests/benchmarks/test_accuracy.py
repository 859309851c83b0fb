"""The honest comparison: its controls have the bytes they claim, and its records are safe."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from comparison.runs import candidates, reported
from comparison.store import Store, table
from comparison.train import SIZES, Batches, train_one

from examples.control_files import count_bytes
from examples.gpt import FeedForward

TINY = {"width": 32, "depth": 1, "context": 16, "batch": 2, "steps": 3, "judge": 200}


def data():
    text = torch.randint(256, (2000,), dtype=torch.uint8)
    return {"train": text, "tuning": text[:300], "test": text[300:600]}


def test_the_wider_control_fills_the_budget_and_no_more():
    run = reported("scratch", 50_000)["ternary dense, bytes of butterfly 8"]
    block = run.block(FeedForward(64, 256))
    assert 0.98 * 50_000 < count_bytes(block) <= 50_000


@pytest.mark.parametrize("name", ["dense", "ternary dense", "ternary standard 8 top-2"])
def test_controls_start_as_wide_as_the_layer_they_stand_beside(name):
    block = reported("scratch", 50_000)[name].block(FeedForward(64, 256))
    matrices = {p.shape[-1]: p for p in block.parameters() if sorted(p.shape[-2:]) == [64, 256]}
    assert matrices[64].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert matrices[256].std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_every_model_sees_the_same_windows():
    text = data()["train"]
    first = list(Batches(text, TINY, seed=3, steps=2))
    torch.manual_seed(9)  # the global generator has no say
    second = list(Batches(text, TINY, seed=3, steps=2))
    assert not torch.equal(first[0][0], first[1][0])
    for (x, y), (again, _) in zip(first, second, strict=True):
        assert torch.equal(x, again) and x.shape == (2, 16)
        assert torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize("angles", ["hadamard", "identity", "frozen"])
def test_frozen_rotations_stay_where_they_were_put(angles):
    names = {"hadamard": "Hadamard", "identity": "identity", "frozen": "random angles"}
    run = reported("scratch", 50_000)[f"butterfly 8 top-2, frozen {names[angles]}"]
    record, model = train_one("scratch", run, TINY, data(), "test", 0)
    found = model.blocks[0].mlp.experts.up.rotate_in.angles
    expected = {"hadamard": torch.pi / 4, "identity": 0.0}.get(angles)
    assert not found.requires_grad
    if expected is None:
        assert found.std().item() == pytest.approx(0.5, rel=0.1)
    else:
        assert torch.equal(found, torch.full_like(found, expected))
    assert record["steps"] == 3 and 0 < record["loss"] < 10 and record["ffn_bytes_per_layer"] > 0


def test_tuning_and_reported_runs_know_each_size_and_mode():
    for mode in ("scratch", "continue"):
        assert "butterfly 8 top-2" in reported(mode, 50_000)
        assert "8 top-2 lambda always 1" in candidates(mode)
    assert set(SIZES) == {"tiny", "small", "full"}


def test_records_survive_and_foreign_ones_are_refused(tmp_path):
    about = {"size": "tiny", "steps": 3, "judge_split": "test", "device": "cpu", "data": {}}
    path = tmp_path / "accuracy-tiny-test.json"
    store = Store(path, about)
    for seed, loss in enumerate((1.0, 2.0)):
        record = {"loss": loss, "ffn_bytes_per_layer": 5000, "load_max_over_mean": None}
        store.add(f"scratch | dense | {seed}", record)
    assert json.loads(path.read_text())["runs"].keys() == {
        "scratch | dense | 0",
        "scratch | dense | 1",
    }
    assert "| scratch | dense | 1.5000 ± 0.7071 | 2 | 0.005 | |" in table(Store(path, about))
    with pytest.raises(ValueError, match="another device"):
        Store(path, {**about, "device": "NVIDIA H100"})
