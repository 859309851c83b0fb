"""`examples/edge_app.py` in an environment that has numpy, onnxruntime and tokenizers, no torch."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import onnx
import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import export_onnx, load_packed, pack, swap_feed_forward
from lightning_bfmoe.cli import main
from lightning_bfmoe.data import BPETokenizer, train_bpe
from lightning_bfmoe.deploy.onnx_export.folder import digest
from lightning_bfmoe.deploy.onnx_export.runner import find_library
from lightning_bfmoe.layers import set_blend

APP = Path(__file__).parents[2] / "examples" / "edge_app.py"
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "flatbuffers", "packaging", "protobuf")
SIZES = {"vocab_size": 320, "context": 48, "width": 24, "depth": 1, "heads": 2}
PROMPT = "naïve rows of trits, rotated"

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime 1.28 and later have no wheel for Python 3.10"
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python whose environment holds the installed wheels of PACKAGES and nothing else."""
    root = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(root, with_pip=False, symlinks=os.name != "nt")
    python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        for top in {Path(file.parts[0]) for file in distribution.files if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)))
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in done.stderr
    return python


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A packed model with a tokenizer, and its exported folder."""
    folder = tmp_path_factory.mktemp("made")
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    train_bpe(text, vocab_size=SIZES["vocab_size"]).save(folder / "tokenizer.json")
    torch.manual_seed(1)
    model = GPT(**SIZES)
    swap_feed_forward(model, num_experts=4, init="scratch")
    set_blend(model, 1.0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or "position" in name:
                tensor.normal_(0.5, 0.5)
    pack(model, folder / "model.bfmoe")
    export_onnx(
        folder / "model.bfmoe", folder / "edge", model=GPT(**SIZES),
        tokenizer=folder / "tokenizer.json",
    )  # fmt: skip
    return folder


def run(python, folder, *options, text=True):
    command = [python, APP, folder, "--threads", "1", *options]
    return subprocess.run(
        command, capture_output=True, text=text, timeout=60, cwd=folder.parent,
        env={"PYTHONUTF8": "1", "PATH": os.environ["PATH"]},
    )  # fmt: skip


def test_it_writes_what_pytorch_writes(bare, made):
    done = run(bare, made / "edge", "--prompt", PROMPT, "--num-tokens", "20", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    words = BPETokenizer.load(made / "tokenizer.json")
    ids = words.encode(PROMPT)
    model = load_packed(made / "model.bfmoe", GPT(**SIZES))
    wanted = words.decode(model.generate(ids, 20, temperature=0))
    assert done.stdout.startswith(PROMPT)
    assert done.stdout.rstrip("\n\ufffd") == wanted.rstrip("\n\ufffd")


def test_the_custom_op_writes_the_same(bare, made):
    library = find_library()
    if library == Path():
        pytest.skip("the CPU kernels are not compiled here")
    options = ["--prompt", PROMPT, "--num-tokens", "20", "--temperature", "0"]
    fused = run(bare, made / "edge", *options, "--library", library)
    assert fused.returncode == 0, fused.stderr
    assert fused.stdout == run(bare, made / "edge", *options).stdout


def test_it_samples_and_stops_at_the_context(bare, made):
    first, again, other = (
        run(bare, made / "edge", "--prompt", PROMPT, "--num-tokens", "999", "--seed", seed).stdout
        for seed in "112"
    )
    assert first == again != other
    assert first.startswith(PROMPT) and len(first) > len(PROMPT)


def test_bad_prompts(bare, made):
    long = run(bare, made / "edge", "--prompt", "word " * 60)
    assert long.returncode == 1 and "tokens, the context holds 48" in long.stderr
    empty = run(bare, made / "edge", "--prompt", "")
    assert empty.returncode == 1 and "the prompt is empty" in empty.stderr
    foreign = run(bare, made / "edge", "--prompt", b"\xff\xfe", text=False)
    assert foreign.returncode == 1 and b"UTF-8" in foreign.stderr
    for done in (long, empty, foreign):
        assert b"Traceback" not in (done.stderr if done is foreign else done.stderr.encode())


def newer_opset(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.opset_import[0].version = 99
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    settings = json.loads((folder / "generation.json").read_text())
    settings["files"]["model.onnx"]["sha256"] = digest(folder / "model.onnx")
    (folder / "generation.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "weights.bin").write_bytes(b"1234"), "weights.bin is damaged"),
        (lambda folder: (folder / "model_ops.onnx").write_bytes(b""), "model_ops.onnx is damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "generation.json").write_bytes(b"\xff{"), "DecodeError"),
        (newer_opset, "opset"),
    ],
)
def test_bad_folders(damage, match, bare, made, tmp_path):
    folder = shutil.copytree(made / "edge", tmp_path / "edge")
    damage(folder)
    done = run(bare, folder)
    assert done.returncode == 1 and done.stdout == ""
    assert match in done.stderr and "Traceback" not in done.stderr


def test_the_page_says_what_works(bare, made, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    lines = page.partition("## CPU edge device")[2].splitlines()
    (export,) = [line for line in lines if line.startswith("bfmoe export")]
    (app, fused) = [line for line in lines if line.startswith("python examples/edge_app.py")]
    shutil.copy(made / "model.bfmoe", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(export)[1:]) == 0
    assert "1 ButterflyMoE layers" in capsys.readouterr().out
    assert "--library" in fused
    words = shlex.split(app)[2:]
    done = run(bare, tmp_path / words[0], *words[1:])
    assert done.returncode == 0 and done.stdout.startswith("To be"), done.stderr
