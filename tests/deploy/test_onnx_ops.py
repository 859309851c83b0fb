"""The opaque ops, and the ONNX nodes they become: rotations alike, trits exact."""

import sys

import onnx
import pytest
import torch
from torch import nn

from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.deploy.onnx_export.graph import to_onnx, write_graph
from lightning_bfmoe.deploy.onnx_export.layer import ExportedRotation, replace_layers
from lightning_bfmoe.deploy.onnx_export.lower import FEW_ROWS
from lightning_bfmoe.deploy.onnx_export.ops import code_trits, product
from lightning_bfmoe.deploy.onnx_export.rotate import ROWS_AN_EXPERT
from lightning_bfmoe.deploy.onnx_export.runner import open_session
from lightning_bfmoe.functional.butterfly import apply_butterfly, num_pairs, num_stages
from lightning_bfmoe.layers import ButterflyMoE, CodedRotation, Rotation

WIDTHS = (2, 3, 7, 8, 12, 20)
EXPERTS = 3

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime 1.28 and later have no wheel for Python 3.10"
)


def rotation(d, kind, stages=None):
    if kind in ("fp16", "fp32"):
        made = Rotation(d, EXPERTS, stages=stages, angle_std=2.0)
        return made.freeze(torch.float16 if kind == "fp16" else torch.float32)
    shape = (EXPERTS, stages or num_stages(d), num_pairs(d))
    return CodedRotation.of(torch.randn(shape), int(kind[3:]))


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("inverse", [False, True])
def test_stored_angles_rotate_alike(d, kind, inverse):
    source = rotation(d, kind, stages=min(2, num_stages(d)) if d == 12 else None)
    x, ids = torch.randn(5, d), torch.randint(EXPERTS, (5,))
    y = ExportedRotation(source, d, inverse=inverse)(x, ids)
    torch.testing.assert_close(y, apply_butterfly(x, source.angles[ids].float(), inverse))


@pytest.mark.parametrize("d_in", [1, 128, 200])
def test_coded_trits_are_exact(d_in):
    trits = torch.randint(-1, 2, (6, d_in), dtype=torch.int8)
    x, alpha = torch.randn(4, d_in), torch.rand(6, 1)
    y = product(x, code_trits(trits), alpha, d_in)
    torch.testing.assert_close(y, x @ (alpha * trits).T)


@pytest.mark.parametrize(
    "settings",
    [
        {"gated": True, "activation": "silu"},
        {"down": "dense"},
        {"gains": True, "bias": False, "stages": 2},
        {"activation_bits": 4, "granularity": "tensor", "d_out": 9},
    ],
)
@pytest.mark.parametrize("angles", ["fp16", "int8", "int4"])
def test_an_exported_layer_computes_what_the_packed_one_does(settings, angles, tmp_path):
    def build():
        return nn.Sequential(ButterflyMoE(7, 12, EXPERTS, 2, **settings))

    pack(build(), tmp_path / "model.bfmoe", angles=angles)
    layer = load_packed(tmp_path / "model.bfmoe", build())
    x = torch.randn(2, 6, 7)
    wanted = layer(x)
    assert replace_layers(layer) == 1
    torch.testing.assert_close(layer(x), wanted)


class Rotations(nn.Module):
    """All kinds side by side, fed from one row of the largest width."""

    def __init__(self, cases):
        super().__init__()
        self.cases = nn.ModuleList(
            ExportedRotation(source, d, inverse=inverse) for source, d, inverse in cases
        )
        self.widths = [d for _, d, _ in cases]

    def forward(self, x):
        ids = x[:, 0].abs().long() % EXPERTS
        pairs = zip(self.cases, self.widths, strict=True)
        return torch.cat([case(x[:, :d], ids) for case, d in pairs], -1)


class Products(nn.Module):
    """Two widths, one of which fills no block."""

    def __init__(self, trits):
        super().__init__()
        self.d_in = trits.shape[1]
        self.register_buffer("codes", code_trits(trits))
        self.register_buffer("alpha", 0.25 * torch.ones(trits.shape[0], 1))

    def forward(self, x):
        return product(x, self.codes, self.alpha, self.d_in)


def run(folder, model, *inputs):
    session = open_session(folder / "model.onnx", threads=1)
    (name,) = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in inputs]


def export(folder, module, example, products="2bit"):
    folder.mkdir()
    write_graph(to_onnx(module, example, 21), folder, products)
    return folder


def test_rotations_as_onnx_nodes(tmp_path):
    kinds = ("fp16", "int8", "int4", "fp32")
    widths = (8, 12, 7, 20, 2, 32, 32, 24)
    cases = [(rotation(d, kinds[i % 4]), d, i % 2 == 0) for i, d in enumerate(widths)]
    cases.append((rotation(12, "fp16", stages=2), 12, True))
    cases.append((rotation(32, "int4", stages=3), 32, False))
    module = Rotations(cases)
    many = ROWS_AN_EXPERT * EXPERTS
    x = 3 * torch.randn(many + 3, 32)
    folder = export(tmp_path / "rotations", module, x[:2])
    # some rows, and so many that blocks are made; the last of them for two experts alone
    sets = [x[:0], x[:1], x[: many - 1], x[:many], x, x.abs()]
    sets[-1][:, 0] = sets[-1][:, 0].long() % 2
    for rows, found in zip(sets, run(folder, module, *sets), strict=True):
        torch.testing.assert_close(found, module(rows), rtol=1e-5, atol=2e-5)


def test_rotations_permute_no_table_and_keep_no_factors(tmp_path):
    module = Rotations([(rotation(64, "fp16"), 64, True), (rotation(64, "fp16"), 64, False)])
    folder = export(tmp_path / "rotations", module, torch.randn(2, 64))
    graph = onnx.load(folder / "model.onnx").graph
    tables = {name.name for name in graph.initializer if list(name.dims) == [EXPERTS, 6, 32]}
    assert len(tables) == 2
    inside = [graph, *(a.g for n in graph.node for a in n.attribute if a.type == a.GRAPH)]
    for part in inside:  # a constant expression over a table would be kept by the session
        readers = [node for node in part.node if tables & set(node.input)]
        assert all(node.op_type == "Gather" for node in readers)


@pytest.mark.parametrize("products", ["2bit", "int8", "both"])
def test_products_are_exact_where_eight_bits_hold_the_input(products, tmp_path):
    trits = torch.randint(-1, 2, (24, 200), dtype=torch.int8)
    module = Products(trits)
    x = torch.randint(-127, 128, (FEW_ROWS + 5, 200)).float()
    x[:, [0, 130]] = 127.0  # the largest number of each row and block: the 8-bit grid is 1
    folder = export(tmp_path / "products", module, x[:2], products)
    few = x[:FEW_ROWS]
    for rows, found in zip((x, few), run(folder, module, x, few), strict=True):
        assert torch.equal(found, 0.25 * rows @ trits.float().T)


def test_the_file_holds_the_codes_once_and_no_factors(tmp_path):
    trits = torch.randint(-1, 2, (64, 1280), dtype=torch.int8)
    module = Products(trits)
    folder = export(tmp_path / "both", module, torch.zeros(2, 1280), "both")
    data = (folder / "weights.bin").read_bytes()
    assert len(data) <= 64 * 1280 // 4 + 4096  # the codes, and the table of a byte's trits
    assert code_trits(trits).numpy().tobytes() in data
