"""The deployment benchmark: its forms compute what they say, and it writes what it measured."""

import argparse
import json

import pytest
import torch

from benchmarks import deploy, deploy_forms

HERE = ["dense fp32", "dense bf16", "standard MoE fp32", "ours int8 angles, low memory"]


@pytest.mark.parametrize("name", [*HERE, "standard MoE bf16", "ours int8 angles, bf16 rest"])
def test_a_form_comes_back_from_its_file_and_decodes(name, tmp_path):
    form, path = deploy.FORMS[name], tmp_path / "model"
    assert deploy.write("tiny", form, path) == path.stat().st_size
    model = deploy.read("tiny", form, path, "cpu")
    assert deploy.check(model, "tiny", "cpu") < 5e-2
    assert model.head.weight is model.embed.weight
    if "angles" not in form:
        ids = torch.arange(6).reshape(1, 6)
        with torch.no_grad():
            assert torch.equal(model(ids), deploy_forms.build("tiny", form).eval()(ids))


def test_nf4_is_near_the_matrix_it_quantised(tmp_path):
    pytest.importorskip("bitsandbytes")
    form, path = deploy.FORMS["standard MoE nf4"], tmp_path / "model"
    deploy.write("tiny", form, path)
    model, plain = deploy.read("tiny", form, path, "cpu"), deploy_forms.build("tiny", form).eval()
    x = torch.randn(7, 32)
    with torch.no_grad():
        ours, theirs = (m.blocks[0].mlp(x) for m in (model, plain))
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.3


def test_a_run_writes_records_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def measured(*arguments):
        calls.append(arguments)
        rates = {f"{what}_{batch}": 1.0 for what in ("prefill", "decode") for batch in (1, 8)}
        return {"load_seconds": 0.1, "resident_bytes": 5, **rates}

    monkeypatch.setattr(deploy, "child", measured)
    monkeypatch.setitem(deploy.FORMS, "broken", {"angles": "int9"})
    options = argparse.Namespace(
        out=tmp_path / "a" / "out.json", device="cpu", size="tiny", forms=["dense fp32", "broken"],
        threads=[1, 2], note="alone", rounds=1, limit=1e9,
    )  # fmt: skip
    content = deploy.run(options)
    assert [r["threads"] for r in content["records"]] == [1, 2, 1, 2]
    assert "int9" in content["records"][3]["failed"]
    assert content["records"] == json.loads(options.out.read_text())["records"]
    assert deploy.run(options)["records"] == content["records"]
    assert [call[1::3] for call in calls] == [("dense fp32", 1), ("dense fp32", 2)]
    options.rounds, options.limit = 2, -1.0  # what is left of the second round is not begun
    assert deploy.run(options)["records"] == content["records"]
    shown = deploy.table(content["records"])
    assert "dense fp32" in shown and "ConfigError" in shown


@pytest.mark.parametrize(
    ("code", "out", "error", "record"),
    [
        (0, 'a line\n{"decode_1": 2.0}\n', "", {"decode_1": 2.0}),
        (1, "", "Traceback\nKeyError: 3\n\n", {"failed": "KeyError: 3"}),
        (-9, "", "", {"failed": "exit status -9"}),
    ],
)
def test_a_child_reports_its_record_or_what_went_wrong(
    code, out, error, record, monkeypatch, tmp_path
):
    done = argparse.Namespace(returncode=code, stdout=out, stderr=error)
    monkeypatch.setattr(deploy.subprocess, "run", lambda *args, **options: done)
    assert deploy.child("tiny", "dense fp32", tmp_path, "cpu", 1) == record


def test_pace_and_memory_are_measured(tmp_path):
    form, path = deploy.FORMS["dense fp32"], tmp_path / "model"
    deploy.write("tiny", form, path)
    record = deploy.measure("tiny", "dense fp32", path, "cpu", True, 1)
    assert record["peak_bytes"] >= record["resident_bytes"]
    assert all(record[f"{what}_{n}"] > 0 for what in ("prefill", "decode") for n in (1, 8))
