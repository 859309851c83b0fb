"""`export_onnx`: the cache, batches, what PyTorch writes; and what is refused, leaving nothing."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT
from lightning_bfmoe import export_onnx, load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy.onnx_export.folder import digest
from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel, find_library
from lightning_bfmoe.errors import ConfigError, ExportError, PackedFileError
from lightning_bfmoe.layers import ButterflyMoE, moe_layers, set_blend

SIZES = {"vocab_size": 40, "context": 24, "width": 20, "depth": 2, "heads": 2, "hidden": 44}
IDS = np.random.default_rng(0).integers(0, 40, (3, 20))

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime 1.28 and later have no wheel for Python 3.10"
)


def trained(model, **settings):
    """Swapped, and moved away from its start so that every part matters."""
    swap_feed_forward(model, num_experts=4, init="scratch", **settings)
    set_blend(model, 1.0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "gain" in name or "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif any(part in name for part in ("router", "position", "bias", "correction")):
                tensor.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "model.bfmoe"
    pack(trained(GPT(**SIZES), gains=True, correction_rank=3), path, angles="int8")
    return path


@pytest.fixture(scope="module")
def exported(packed):
    folder = packed.parent / "edge"
    report = export_onnx(packed, folder, model=GPT(**SIZES), generation={"eos": [7]})
    assert report.layers == 2 and report.context == 24 and report.top1_agreement > 0.8
    assert f"{report.files['weights.bin']:,}" in str(report)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "edge")


@pytest.fixture(scope="module")
def runner(exported):
    return OnnxModel(exported, threads=1)


def test_logits_are_those_of_the_packed_model(packed, runner):
    logits, _ = runner(IDS)
    with torch.no_grad():
        wanted = load_packed(packed, GPT(**SIZES))(torch.from_numpy(IDS)).numpy()
    error = np.linalg.norm(logits - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.median(error) < 2e-2  # 8-bit activations, twice a layer
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() > 0.9


def test_in_pieces_and_in_batches_as_whole(runner):
    whole, cache = runner(IDS)
    past, pieces = None, []
    for start, stop in ((0, 1), (1, 12), (12, 13), (13, 20)):
        logits, past = runner(IDS[:, start:stop], past)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=0, atol=1e-4)
    for ours, wanted in zip(past, cache, strict=True):
        assert ours.shape == wanted.shape == (3, 2, 20, 10)
    alone, _ = runner(IDS[1:2])
    np.testing.assert_allclose(alone, whole[1:2], rtol=0, atol=1e-4)
    assert runner(np.zeros((0, 4), np.int64))[0].shape == (0, 4, 40)


def test_greedy_text_and_the_end_of_the_context(packed, runner):
    written = runner.generate(IDS[:1, :9], 12)
    model = load_packed(packed, GPT(**SIZES))
    wanted = model.generate(torch.from_numpy(IDS[0, :9]), 12, temperature=0)
    assert (written[0] == wanted.numpy()).mean() > 0.9
    assert runner.generate(IDS[:1, :20], 99).shape == (1, 25)  # one more than the context holds
    with pytest.raises(ExportError, match=r"context holds 24 tokens: got 25.*Shorten the prompt"):
        runner(np.zeros((1, 25), np.int64))
    with pytest.raises(ExportError, match="knows tokens 0 to 39: got 0 to 40"):
        runner(np.array([[0, 40]]))
    with pytest.raises(ExportError, match="at least one token"):
        runner(np.zeros((1, 0), np.int64))


def test_settings_name_every_file_and_no_path_of_this_machine(exported):
    settings = json.loads((exported / "generation.json").read_text())
    assert settings["generation"]["eos"] == [7] and settings["tokenizer"] == "bytes"
    graphs = {"model.onnx", "model_ops.onnx"}
    assert set(settings["files"]) == {*graphs, "weights.bin"}
    assert {path.name for path in exported.iterdir()} == {*graphs, "weights.bin", "generation.json"}
    text = (exported / "model.onnx").read_bytes()
    assert b"site-packages" not in text and str(exported.parent).encode() not in text
    nodes = onnx.load(exported / "model.onnx", load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 4
    for node in products:
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["accuracy_level"]) == (2, 4)
    assert {node.domain for node in nodes} <= {"", "com.microsoft"}


def test_the_custom_op_computes_what_the_stock_graph_does(exported, runner, tmp_path):
    if find_library() == Path():
        pytest.skip("the CPU kernels are not compiled here")
    stock = OnnxModel(exported, threads=1, library="")
    assert runner.fused and not stock.fused
    nodes = onnx.load(exported / "model_ops.onnx", load_external_data=False).graph.node
    assert {node.op_type for node in nodes if node.domain == "bfmoe"} == {"RotateRows"}
    for ids in (IDS, IDS[:1, :1], IDS[:0]):
        np.testing.assert_allclose(runner(ids)[0], stock(ids)[0], rtol=0, atol=1e-4)
    with pytest.raises(ExportError, match=r"onnxruntime can run the graph: got .*no_such.so"):
        OnnxModel(exported, library=tmp_path / "no_such.so")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "weights.bin",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "as it was written: got we",
        ),
        ("model.onnx", None, "every file of an export is there: got no model.onnx"),
        ("generation.json", None, "an exported folder has a generation.json"),
        ("generation.json", lambda data: b"\xff\xfe{}", "generation.json is JSON text"),
        ("generation.json", lambda data: b"[]", "says format 'bfmoe-onnx'"),
        ("generation.json", lambda data: data.replace(b'"version": 1', b'"version": 9'), "got 9"),
        ("generation.json", lambda data: data.replace(b'"cache"', b'"cash"'), "has 'cache'"),
        ("generation.json", lambda data: data.replace(b"weights", b"../wei"), "got no ../wei"),
    ],
)
def test_a_damaged_folder(copied, name, change, match):
    path = copied / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=match):
        OnnxModel(copied)


def forge(folder, edit):
    """A changed graph with a checksum that fits."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    settings = json.loads((folder / "generation.json").read_text())
    settings["files"]["model.onnx"]["sha256"] = digest(folder / "model.onnx")
    (folder / "generation.json").write_text(json.dumps(settings))


def test_a_graph_that_the_runtime_does_not_know(copied):
    forge(copied, lambda model: setattr(model.opset_import[0], "version", 99))
    with pytest.raises(ExportError, match=r"knows the graph's opset.*or export with a lower opset"):
        OnnxModel(copied, library="")
    forge(copied, lambda model: setattr(model.opset_import[0], "version", 21))
    forge(copied, lambda model: setattr(model.graph.node[3], "op_type", "Unheard"))
    with pytest.raises(ExportError, match="onnxruntime can run the graph: got .*Unheard"):
        OnnxModel(copied, library="")


def test_an_old_runtime(exported, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.27.0")
    with pytest.raises(ExportError, match=r"needs onnxruntime 1.28 or newer: got 1.27.0"):
        OnnxModel(exported)


def test_nothing_is_overwritten_unasked(packed, exported, tmp_path, monkeypatch):
    before = digest(exported / "model.onnx")
    with pytest.raises(ExportError, match="never overwritten unasked"):
        export_onnx(packed, exported, model=GPT(**SIZES))
    assert digest(exported / "model.onnx") == before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(ExportError, match="only an exported folder is overwritten"):
        export_onnx(packed, precious, model=GPT(**SIZES), overwrite=True)
    with pytest.raises(ExportError, match="the parent folder must exist"):
        export_onnx(packed, tmp_path / "no" / "edge", model=GPT(**SIZES))
    assert (precious / "thesis.txt").exists()


class Encoder(nn.Module):
    """Attention that looks ahead, or as asked."""

    def __init__(self, mask=None, **options):
        super().__init__()
        self.mask, self.options = mask, options
        self.embed, self.layer = nn.Embedding(40, 8), ButterflyMoE(8, 12, 2)

    def forward(self, ids):
        x = self.embed(ids).unsqueeze(1)
        mask = None if self.mask is None else self.mask(ids.shape[1])
        x = F.scaled_dot_product_attention(x, x, x, mask, **self.options)
        return self.layer(x.squeeze(1))


class Backwards(Encoder):
    """Positions from the end: no rule covers that."""

    def forward(self, ids):
        back = ids.shape[1] - torch.arange(ids.shape[1])
        x = (self.embed(ids) + back.unsqueeze(1) / 9).unsqueeze(1)
        return self.layer(F.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1))


class Branching(Encoder):
    def forward(self, ids):
        return self.layer(self.embed(ids) if ids.sum() > 3 else 2 * self.embed(ids))


class Pair(Encoder):
    def forward(self, ids):
        return self.embed(ids), 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Encoder, "cached attention is causal: got .*looks ahead.*Supported are decoders"),
        (lambda: Encoder(lambda n: torch.ones(n, n).bool().tril(1)), "mask is not the causal one"),
        (lambda: Encoder(is_causal=True, dropout_p=0.1), "it has dropout; call model.eval"),
        (Backwards, r"answers as without one: got logits that differ by .*cache=False"),
        (Branching, r"exported by torch.export.*take token ids alone and not branch"),
        (Pair, "an exported model returns its logits: got tuple"),
        (lambda: nn.Sequential(ButterflyMoE(8, 12, 2)), "takes token ids: got Sequential"),
        (lambda: nn.Sequential(nn.Embedding(9, 8), ButterflyMoE(8, 12, 2)), "a cache needs attent"),
    ],
)
def test_what_cannot_be_exported(make, match, tmp_path):
    with pytest.raises(ExportError, match=re.compile(match, re.DOTALL)):
        export_onnx(make(), tmp_path / "edge")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_late_leaves_nothing(packed, tmp_path, monkeypatch):
    def fail(*_):
        assert len(list(tmp_path.iterdir())) == 1, "a partial folder is there"
        raise ExportError("every operation of the model has an ONNX form")

    monkeypatch.setattr("lightning_bfmoe.deploy.export.to_onnx", fail)
    with pytest.raises(ExportError, match="has an ONNX form"):
        export_onnx(packed, tmp_path / "edge", model=GPT(**SIZES))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [("{}", "a tokenizer is a JSON file of the package"), (None, "No such file"), (41, "got 41")],
)
def test_a_tokenizer_that_does_not_fit(text, match, packed, tmp_path):
    path = tmp_path / "tokenizer.json"
    if isinstance(text, int):
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({f"w{i}": i for i in range(text)}, "w0")).save(str(path))
    elif text is not None:
        path.write_text(text)
    with pytest.raises(ExportError, match=match):
        export_onnx(packed, tmp_path / "edge", model=GPT(**SIZES), tokenizer=path)
    assert not (tmp_path / "edge").exists()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"products": "4bit"}, ConfigError, "products must be one of"),
        ({"opset": 9}, ConfigError, "opset must be one of"),
        ({"context": 0}, ConfigError, "context is a number of tokens"),
        ({"context": 3}, ExportError, "a context holds at least 6 tokens"),
        ({"model": nn.Identity()}, ConfigError, "the fresh instance for a packed file"),
    ],
)
def test_choices(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export_onnx(Encoder(), tmp_path / "edge", **options)


def test_a_lambda_below_one_and_a_file_without_its_model(packed, tmp_path):
    model = GPT(**SIZES)
    swap_feed_forward(model, num_experts=2)
    set_blend(model, 0.5)
    with pytest.raises(PackedFileError, match="at blend"):
        export_onnx(model, tmp_path / "edge")
    with pytest.raises(ConfigError, match="a packed file needs a fresh instance"):
        export_onnx(packed, tmp_path / "edge")
    with pytest.raises(ConfigError, match="a packed file has its angles"):
        export_onnx(packed, tmp_path / "edge", model=model, angles="int4")


def test_a_hugging_face_model_with_grouped_queries(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = trained(LlamaForCausalLM(config).eval())
    latent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(list(moe_layers(model))) == 1
    report = export_onnx(model, tmp_path / "edge", products="both", angles="int4")
    assert all(torch.equal(latent[name], tensor) for name, tensor in model.state_dict().items())
    assert report.context == 32 and report.top1_agreement > 0.8
    runner = OnnxModel(tmp_path / "edge", threads=1)
    assert runner.settings["cache"] == [{"heads": 2, "key_width": 4, "value_width": 4}]
    logits, past = runner(IDS[:, :15])
    first, past = runner(IDS[:, :14])
    second, past = runner(IDS[:, 14:15], past)
    np.testing.assert_allclose(np.concatenate([first, second], 1), logits, rtol=0, atol=1e-4)
    stored = onnx.load(tmp_path / "edge" / "model.onnx", load_external_data=False).graph.initializer
    tables = [t for t in stored if sorted(t.dims) == [16, 40]]
    assert len(tables) == 1, "the tied embedding is stored once"
