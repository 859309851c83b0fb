"""`verify_packed`: what it finds good, and what it does not."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bfmoe.deploy import pack, verify_packed
from lightning_bfmoe.deploy.example import OUTPUT
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from tests.deploy.test_coded_files import ANGLES, build, forged

OLD = Path(__file__).parent / "data" / "version_1.bfmoe"


@pytest.mark.parametrize(
    ("layer", "rotations"),
    [
        (lambda: ButterflyMoE(7, 9, 3, gated=True, gains=True), 3 * 6),
        (lambda: ButterflyMoE(8, 16, 3, down="dense", stages=2), 3 * 2),
        (lambda: ButterflyExperts(6, 10, 2), 2 * 4),
        (lambda: ButterflyMoE(6, 10, 2, activation=nn.PReLU()), 2 * 4),
    ],
    ids=["gated", "dense", "experts", "custom"],
)
@pytest.mark.parametrize("angles", ["fp16", "int8", "int4"])
def test_every_kind_of_layer_without_its_model(layer, rotations, angles, file):
    pack(nn.Sequential(nn.Identity(), layer()), file, angles=angles)
    found = verify_packed(file)
    assert (found.layers, found.rotations, found.recorded) == (1, rotations, False)
    assert 0 < found.orthogonality < 1e-12


def test_an_old_file():
    assert verify_packed(OLD).rotations == 8


def test_the_recorded_forward_pass_is_repeated_exactly(file):
    model = build().train()
    state = torch.get_rng_state()
    pack(model, file, angles="int4", example=torch.ones(2, 3))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    found = verify_packed(file, build())
    assert found.recorded and found.example_error == 0.0
    assert verify_packed(file).example_error is None


@pytest.mark.parametrize(
    ("name", "at", "value", "match"),
    [
        (ANGLES + ".angles", 0, b"\x00\x7e", "every number of a packed layer is finite"),
        (OUTPUT, 0, b"\x00\x00\x80\x40", "computes what was recorded, to 0.0001"),
    ],
)
def test_forged_numbers(name, at, value, match, file):
    pack(build(), file, example=torch.ones(2, 3))
    file.write_bytes(forged(file, name, at, value))
    with pytest.raises(PackedFileError, match=match):
        verify_packed(file, build())


class Pair(nn.Sequential):
    """Returns no tensor."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("kind", "example", "match"),
    [
        (nn.Sequential, [], "a tensor or several"),
        (nn.Sequential, ["text"], "got .'str'"),
        (nn.Sequential, torch.ones(2, 4), "is an input of the model"),
        (nn.Sequential, torch.full((1, 3), torch.inf), "finite numbers"),
        (Pair, torch.ones(2, 3), "one tensor of finite numbers: got tuple"),
    ],
)
def test_an_example_that_cannot_be_recorded(kind, example, match, file):
    with pytest.raises(PackedFileError, match=match):
        pack(kind(*build()), file, example=example)
    assert not list(file.parent.iterdir())
