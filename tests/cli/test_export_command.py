"""`bfmoe export`: what it writes, says and refuses."""

import json
import sys

import onnx
import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import pack, swap_feed_forward
from lightning_bfmoe.cli import main
from lightning_bfmoe.layers import set_blend

INIT = {"vocab_size": 256, "context": 16, "width": 8, "depth": 1, "heads": 2}
MODULE = ["--module", "examples.gpt:GPT"]

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime 1.28 and later have no wheel for Python 3.10"
)


@pytest.fixture
def packed(tmp_path):
    model = GPT(**INIT)
    swap_feed_forward(model, num_experts=2)
    set_blend(model, 1.0)
    pack(model, tmp_path / "model.bfmoe")
    return tmp_path / "model.bfmoe"


def test_a_file_becomes_a_folder_beside_it(packed, capsys):
    assert main(["export", str(packed), *MODULE, "--products", "int8"]) == 0
    folder = packed.with_name("model-onnx")
    out = capsys.readouterr().out
    assert "1 ButterflyMoE layers" in out and f"edge_app.py {folder}" in out
    settings = json.loads((folder / "generation.json").read_text())
    assert (settings["products"], settings["context"]) == ("int8", 16)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    angles = [tensor for tensor in graph.initializer if tensor.name.endswith("angles")]
    assert {tensor.data_type for tensor in angles} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "--module must name the model's class"),
        ([*MODULE, "--out", "no/such/edge"], "the parent folder must exist"),
        ([*MODULE, "--opset", "3"], "opset must be one of"),
        ([*MODULE, "--tokenizer", "no.json"], "a tokenizer is a JSON file"),
        ([*MODULE, "--init", '{"width": 10}'], "the block at 'blocks.0.mlp' has"),
    ],
)
def test_refusals_leave_nothing(options, match, packed, capsys):
    before = sorted(packed.parent.iterdir())
    assert main(["export", str(packed), *options]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert match in said
    assert sorted(packed.parent.iterdir()) == before


def test_force_is_needed_to_replace(packed, capsys):
    (packed.parent / "model-onnx").mkdir()
    assert main(["export", str(packed), *MODULE]) == 2
    assert "never overwritten unasked" in " ".join(capsys.readouterr().err.split())
    assert torch.is_grad_enabled()
