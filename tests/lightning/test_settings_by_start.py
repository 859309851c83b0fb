"""What is not set depends on how the layers start."""

import pytest
import torch
from torch import nn

from lightning_bfmoe import ButterflyMoECallback, Plan, swap_feed_forward
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.layers import moe_layers


@pytest.mark.parametrize(
    ("init", "scale", "rate", "factor", "plan"),
    [
        ("preserve", "lstsq", 1e-3, 5.0, Plan()),
        ("scratch", "absmean", 1e-2, 20.0, Plan(start=0, end=0)),
    ],
)
def test_defaults_by_start(init, scale, rate, factor, plan):
    callback = ButterflyMoECallback(init=init)
    assert callback.plan == plan and callback.angle_lr_factor == factor
    block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    model = nn.ModuleDict({"mlp": block})
    swap_feed_forward(model, callback.config)
    ((_, layer),) = moe_layers(model)
    assert layer.experts.up.substrate.scale == layer.experts.down.substrate.scale == scale
    assert layer.router.balance_rate == rate
    assert layer(torch.ones(2, 8)).shape == (2, 8)


def test_what_is_set_stays_set():
    plan = Plan(start=5, end=9)
    settings = {"scale": "lstsq", "balance_rate": 0.0, "angle_lr_factor": 3.0, "plan": plan}
    callback = ButterflyMoECallback(init="scratch", **settings)
    assert callback.plan == plan and callback.angle_lr_factor == 3.0
    assert callback.config.scale_or_default == "lstsq"
    assert callback.config.balance_rate_or_default == 0.0


def test_a_config_goes_through_json_with_its_defaults_unset():
    config = ButterflyMoEConfig(init="scratch")
    assert config.to_dict()["scale"] is None and config.to_dict()["balance_rate"] is None
    assert ButterflyMoEConfig.from_dict(config.to_dict()) == config
