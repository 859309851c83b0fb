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
    monkeypatch.setattr(speed, "measure", lambda *args: {**full(*args), "pass": 1})
    content = speed.run("tiny", "cpu", out, limit=1e9)
    assert len(content["records"]) == len(speed.jobs("tiny")) == 6
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured twice"))
    assert speed.run("tiny", "cpu", out, limit=1e9) == json.loads(out.read_text()) == content
    assert not any("failed" in record for record in content["records"])
    for record in content["records"]:
        assert record["error"] < 1e-4 and record["seconds"] > 0 and record["limit_seconds"] > 0
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
    monkeypatch.undo()
    monkeypatch.setitem(speed.SIZES, "tiny", TINY)
    monkeypatch.setattr(speed, "DECODE", [1])
    content = speed.run("tiny", "cpu", tmp_path / "speed.json", limit=1e9, again="failed")
    assert len(content["records"]) == 6 and not any("failed" in r for r in content["records"])


def test_a_missing_package_is_said_and_tried_again(tmp_path, monkeypatch):
    out, names = tmp_path / "speed.json", ("butterfly", "nf4", "gemlite2", "scattermoe")
    monkeypatch.setattr(speed.peers, "SCATTERMOE", [])
    for name in ("bitsandbytes", "gemlite.helper", "scattermoe"):
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    for _ in range(2):
        content = speed.run("tiny", "cpu", out, limit=1e9, names=names)
    absent = [(r["what"], r["peer"]) for r in content["records"] if "absent" in r]
    assert absent == [
        ("train", "scattermoe"),
        ("decode", "nf4"), ("decode", "gemlite2"), ("decode", "scattermoe"),
    ]  # fmt: skip
    assert len(content["records"]) == 6  # ours are measured once


def test_experts_in_few_bits_are_checked_against_their_dense_forms():
    def halved(weight):
        return lambda rows: rows @ weight.t(), weight.clone(), 4.0

    layer, x = speed.peers.QuantisedExperts(16, 64, 4, 2, torch.float32, halved), torch.randn(3, 16)
    assert speed.check(layer, x) < 1e-6
    touched = len(layer.parts)
    assert 2 <= touched <= 4 and layer.read_bytes(1.0) == 8 * touched
    before = layer(x)
    layer.deploy()
    assert torch.equal(layer(x), before)


def test_filters_and_the_picture(tmp_path):
    job = speed.jobs("tiny")[0]
    assert speed.fits(["what=train", "d=16,32"], job) and not speed.fits(["experts=8"], job)
    content = speed.run("tiny", "cpu", tmp_path / "speed.json", limit=1e9)
    speed.draw(content, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000
