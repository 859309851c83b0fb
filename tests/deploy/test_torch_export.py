"""A packed model goes through torch.export, leaves nothing behind, and imports no compiler."""

import subprocess
import sys

import torch

from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.kernels import library
from lightning_bfmoe.layers import CodedNumbers, PackedSubstrate, set_blend

SIZES = {"vocab_size": 40, "context": 32, "width": 24, "depth": 1, "heads": 2}


def write(path, angles):
    model = GPT(**SIZES)
    swap_feed_forward(model, num_experts=3, top_k=2, angle_std=0.5, gains=True)
    set_blend(model, 1.0)
    pack(model, path, angles=angles, gains="int8")
    return path


def test_a_packed_model_is_exported_by_torch(tmp_path):
    model = load_packed(write(tmp_path / "model.bfmoe", "int8"), GPT(**SIZES))
    ids = torch.randint(40, (2, 9))
    others = torch.randint(40, (3, 17))  # another batch, another length
    free = torch.export.Dim.AUTO
    with torch.no_grad():
        wanted = model(others)  # whatever is kept from a first use is no obstacle
        program = torch.export.export(model, (ids,), dynamic_shapes=({0: free, 1: free},))
        routing = model.blocks[0].mlp.last_routing
        assert routing.load.sum() == 2 * others.numel()  # that of the last real pass
        assert torch.equal(model(others), wanted)  # no traced tensor was kept
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(others), wanted)


def test_an_export_is_no_first_use(tmp_path):
    file = write(tmp_path / "model.bfmoe", "fp16")
    model, ids = load_packed(file, GPT(**SIZES), low_memory=True), torch.randint(40, (2, 9))
    with torch.no_grad():
        torch.export.export(model, (ids,))
        assert model.blocks[0].mlp.last_routing is None
        assert torch.equal(model(ids), load_packed(file, GPT(**SIZES), low_memory=True)(ids))


def test_a_compiled_graph_breaks_around_what_is_kept():
    coded = CodedNumbers.of(torch.randn(2, 3, 8), 8)
    matrix = PackedSubstrate.from_ternary(torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1))

    def use(x):
        return x + coded.values.sum() + matrix.weight().sum()

    x = torch.randn(())
    assert torch.equal(torch.compile(use, backend="eager")(x), use(x))
    kept = coded.values, matrix.weight()
    assert coded.values is kept[0] and matrix.weight() is kept[1]


def test_the_library_is_a_constant_of_a_graph_as_torch_marks_it():
    def marked():
        return ""

    marks = vars(torch.compiler.assume_constant_result(marked))
    assert marks.items() <= vars(library.missing_cpu).items()


IMPORTS = """
import sys
import torch
if "torch._dynamo" in sys.modules:
    sys.exit("torch imports it by itself")
import lightning_bfmoe.deploy, lightning_bfmoe.kernels, lightning_bfmoe.layers, lightning_bfmoe.swap
assert "torch._dynamo" not in sys.modules, "the package imports torch._dynamo"
"""


def test_the_package_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0 or "torch imports it" in done.stderr, done.stderr
