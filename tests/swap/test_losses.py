"""What a swap cannot carry over is said."""

import warnings

import pytest
import torch
from torch import nn

from lightning_bfmoe import load_packed, pack, swap_feed_forward


def model():
    return nn.Sequential(
        nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
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
