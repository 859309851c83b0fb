"""The speed benchmark measures what it says, goes on where it stopped, and keeps to one machine."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed

TINY = {"d": [16], "experts": [4], "k": [2], "tokens": 24}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(speed.SIZES, "tiny", TINY)
    monkeypatch.setattr(speed, "DECODE", [1])


def test_all_peers_have_the_same_active_flops():
    dense = speed.PEERS["dense"](16, 64, 4, 2, torch.float32)
    standard = speed.PEERS["standard"](16, 64, 4, 2, torch.float32)
    assert 2 * standard.up[0].numel() == dense.up.weight.numel()
    assert 2 * standard.down[0].numel() == dense.down.weight.numel()


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    out = tmp_path / "speed.json"
    assert speed.run("tiny", "cpu", out, limit=-1.0)["records"] == []
    full = speed.measure
    monkeypatch.setattr(speed, "measure", lambda job, device: {**full(job, device), "pass": 1})
    content = speed.run("tiny", "cpu", out, limit=1e9)
    assert len(content["records"]) == len(speed.jobs("tiny")) == 6
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured twice"))
    assert speed.run("tiny", "cpu", out, limit=1e9) == json.loads(out.read_text()) == content
    assert not any("failed" in record for record in content["records"])
    assert all(record["error"] < 1e-4 and record["seconds"] > 0 for record in content["records"])
    assert [line.split()[0] for line in speed.table(content["records"]).splitlines()] == [
        "train", "decode",
    ]  # fmt: skip


def test_a_file_from_another_machine_is_refused(tmp_path):
    out = tmp_path / "speed.json"
    out.write_text(json.dumps({"facts": {"device": "abacus"}, "records": []}))
    with pytest.raises(SystemExit, match="measured elsewhere"):
        speed.run("tiny", "cpu", out, limit=1.0)


def test_a_step_trains_every_parameter():
    layer, x = speed.build({**speed.jobs("tiny")[0], "peer": "standard"}, "cpu")
    before = [p.detach().clone() for p in layer.parameters()]
    speed.trainer(layer, x)()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setitem(speed.PEERS, "standard", refuse)
    content = speed.run("tiny", "cpu", tmp_path / "speed.json", limit=1e9)
    failed = [record["peer"] for record in content["records"] if "failed" in record]
    assert failed == ["standard", "standard"] and len(content["records"]) == 6
