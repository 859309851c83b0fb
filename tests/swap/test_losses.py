"""What a swap cannot carry over is said."""

import warnings

import pytest
import torch
from torch import nn

from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.errors import PackedFileError


def model(d_ff=16):
    return nn.Sequential(
        nn.LayerNorm(8), nn.Sequential(nn.Linear(8, d_ff), nn.ReLU(), nn.Linear(d_ff, 8))
    )


@pytest.mark.parametrize("place", ["1", "1.0"])
def test_hooks_on_a_swapped_block_are_named(place):
    net = model()
    net.get_submodule(place).register_forward_hook(lambda module, args, out: out * 2)
    with pytest.warns(UserWarning, match="of block '1' do not run after the swap"):
        swap_feed_forward(net, num_experts=2)


def test_a_block_frozen_in_part_is_named():
    net = model()
    net[1][0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="Block '1' is frozen in part"):
        swap_feed_forward(net, num_experts=2)


def test_nothing_is_said_of_a_plain_block_or_of_weight_norm():
    net = model()
    nn.utils.weight_norm(net[1][0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(do not run|in part).*")
        swap_feed_forward(net, num_experts=2)
        swap_feed_forward(model(), num_experts=2)


def test_swapping_and_loading_under_inference_mode(tmp_path):
    net, target = model(), model()
    with torch.inference_mode():
        swap_feed_forward(net, num_experts=2)
        pack(net, tmp_path / "m.bfmoe")
        small = load_packed(tmp_path / "m.bfmoe", target)
        small(torch.randn(3, 8))
    net(torch.randn(3, 8)).sum().backward()
    assert net[1].experts.up.substrate.latent.grad.abs().max() > 0
    assert small(torch.randn(3, 8)).shape == (3, 8)


def test_a_file_of_another_width_is_refused_and_the_model_left_alone(tmp_path):
    net, other = model(), model(d_ff=32)
    swap_feed_forward(net, num_experts=2)
    pack(net, tmp_path / "m.bfmoe")
    with pytest.raises(PackedFileError, match=r"has matrices of widths \[8, 16\]: got .*\(32, 8\)"):
        load_packed(tmp_path / "m.bfmoe", other)
    assert isinstance(other[1][0], nn.Linear)
