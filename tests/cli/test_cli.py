"""The command `bfmoe`, through its console script's entry and through `main`."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_bfmoe import __version__, pack
from lightning_bfmoe.cli import main
from lightning_bfmoe.layers import ButterflyMoE

PLAN = ["plan", "--d_model", "8", "--d_ff", "8", "--num_experts", "2"]


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def test_plan_prints_both_columns_of_the_papers_table(capsys):
    assert (
        main(
            [
                "plan",
                "--d_model",
                "512",
                "--d_ff",
                "2048",
                "--num_experts",
                "256",
                "--paper_convention",
                "true",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "150.09x" in out and "7.41x" in out  # fp32, and the fair opponent


def test_plan_counts_a_whole_model_on_devices(capsys):
    command = "plan --d_model 512 --d_ff 2048 --num_experts 64 --layers 8 --vocab-size 32000"
    assert main([*command.split(), "--device", "rpi5,rpi-zero2w", "--ram", "100MB"]) == 0
    out = capsys.readouterr().out
    assert "rpi5: 8.0 GiB to use" in out and "rpi-zero2w: 512.0 MiB" in out and "100MB: 100" in out
    assert out.count("ButterflyMoE, low_memory") == 3
    assert out.count("standard MoE, fp32") == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--device", "toaster"], "Known: esp32-s3, "),
        (["--ram", "lots"], "Known: esp32-s3, "),
        (["--ram", "1GB", "--runtime", "java"], "Known: torch, onnxruntime, none"),
        (["--ram", "1GB", "--share", "2"], "share must lie"),
        (["--ram", "1GB", "--context", "0"], "context must be a count"),
        (["--ram", "1GB", "--paper_convention", "true"], "a device holds real files"),
    ],
)
def test_wrong_questions_about_devices(options, match, capsys):
    assert main(["plan", "--d_model=8", "--d_ff=8", "--num_experts=2", *options]) == 2
    assert match in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_one_expert_can_be_planned(capsys):
    assert main([*PLAN[:-1], "1"]) == 0
    assert "1 experts, top-1" in capsys.readouterr().out


def test_inspect_a_packed_file(tmp_path, capsys):
    pack(nn.Sequential(nn.Linear(8, 8), ButterflyMoE(8, 32, 4)), tmp_path / "m.bfmoe")
    assert main(["inspect", str(tmp_path / "m.bfmoe")]) == 0
    out = capsys.readouterr().out
    assert f"{(tmp_path / 'm.bfmoe').stat().st_size:,} bytes" in out and "ButterflyMoE" in out


def test_inspect_a_damaged_file(tmp_path, capsys):
    path = tmp_path / "m.bfmoe"
    path.write_bytes(b"not a packed file")
    assert main(["inspect", str(path)]) == 2
    assert "PackedFileError" in capsys.readouterr().err


def test_inspect_a_checkpoint(tmp_path, capsys):
    layer = ButterflyMoE(8, 32, 4, gated=True)
    layer.set_blend(0.25)
    state = nn.ModuleDict({"mlp": layer}).state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "1 ButterflyMoE layers" in out
    assert "mlp: 8 -> 32 -> 8, 4 experts, gelu, gated, lambda 0.250" in out


def test_inspect_a_broken_checkpoint(tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(b"zip?")
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2
    assert "CheckpointError" in capsys.readouterr().err


def test_inspect_a_class(capsys):
    init = json.dumps({"vocab_size": 16, "context": 8, "width": 16, "depth": 1, "heads": 2})
    assert main(["inspect", "examples.gpt:GPT", "--init", init]) == 0
    out = capsys.readouterr().out
    assert "dry run: nothing was changed" in out and "blocks.0.mlp" in out


@pytest.mark.parametrize("target", ["nothing.here", "examples.gpt:Nope", "no_such_module:X"])
def test_inspect_what_is_not_there(target, capsys):
    assert main(["inspect", target]) == 2
    assert target.split(":")[0].split(".")[0] in capsys.readouterr().err


def test_the_installed_command():
    command = [sys.executable, "-c", "from lightning_bfmoe.cli import main; main(['--help'])"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("demo", "plan", "inspect"):
        assert word in done.stdout
    version = [sys.executable, "-c", "from lightning_bfmoe.cli import main; main(['--version'])"]
    done = subprocess.run(version, capture_output=True, text=True)
    assert done.stdout.strip() == f"bfmoe {__version__}"


@pytest.mark.slow
def test_demo_learns_packs_and_writes(tmp_path, capsys):
    assert main(["demo", "--steps", "4", "--num_experts", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "demo.bfmoe").stat().st_size > 100_000
    assert "text from the packed file" in out and "held-out loss, nats a byte" in out
