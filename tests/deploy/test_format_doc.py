"""docs/format.md is enough to read a packed file: its numpy reader computes what torch computes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.deploy.format import PARTS, Header, LayerRecord, read_packed
from lightning_bfmoe.layers import ButterflyMoE

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader():
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert "torch" not in code
    names = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    return names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gated": True, "gains": True, "activation": "silu"},
        {
            "bias": False,
            "granularity": "tensor",
            "stages": 2,
            "d_out": 5,
            "top_k": 3,
            "correction_rank": 2,
        },  # fmt: skip
    ],
)
@pytest.mark.parametrize(("d_model", "d_ff"), [(8, 32), (6, 10), (7, 9)])
@pytest.mark.parametrize(
    "stored",
    [
        {"bits": "1.6"},
        {"bits": "2", "angles": "fp32"},
        {"angles": "int8", "gains": "int8"},
        {"angles": "int4", "gains": "int8", "rest": "bf16"},
    ],
    ids=lambda stored: "-".join(stored.values()),
)
def test_the_numpy_reader_computes_the_same(settings, d_model, d_ff, stored, reader, file):
    settings = {"activation": "relu", **settings}

    def build():
        layer = ButterflyMoE(d_model, d_ff, 4, **settings)
        with torch.no_grad():  # as trained: logits that differ, and a bias that decides
            layer.router.weight.mul_(20)
            layer.router.balance_bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
            for name, parameter in layer.named_parameters():
                if "gain" in name or "correction" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return nn.Sequential(layer)

    pack(build(), file, **stored)
    tensors, header = reader["read"](file)
    loaded = load_packed(file, build())
    assert header["layers"][0]["config"]["gains"] == settings.get("gains", False)
    assert set(tensors) == {n for n in loaded.state_dict() if not n.endswith("_extra_state")}
    act = {
        "relu": lambda v: np.maximum(v, 0),
        "silu": lambda v: v / (1 + np.exp(-v)),
    }[settings["activation"]]
    for x in torch.randn(3, d_model):
        with torch.no_grad():
            expected = loaded(x).numpy()
        found = reader["layer"](tensors, header["layers"][0], x.numpy(), act)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_page_names_every_field(file):
    pack(nn.Sequential(ButterflyMoE(6, 8, 2)), file)
    header = read_packed(file).header
    fields = [
        *vars(header),
        *vars(header.layers[0]),
        *PARTS,
        *vars(header.tensors["0.router.weight"]),
    ]
    assert {Header, LayerRecord} == {type(header), type(header.layers[0])}
    missing = [name for name in fields if f"`{name}`" not in DOC and f'"{name}"' not in DOC]
    assert missing == []


@pytest.mark.parametrize("version", [1, 2])
def test_the_numpy_reader_reads_older_versions(version, reader):
    tensors, header = reader["read"](Path(__file__).parent / "data" / f"version_{version}.bfmoe")
    x = np.ones(4, np.float32)
    y = reader["layer"](tensors, header["layers"][0], x, lambda v: np.maximum(v, 0))
    assert y.shape == (4,)
    assert np.isfinite(y).all()
