"""Floor 2: nn.Modules. `ButterflyMoE` is the layer; the rest are its parts."""

from lightning_bfmoe.layers.activation import ACTIVATIONS, CUSTOM, Activation
from lightning_bfmoe.layers.aux_loss import attach_loss
from lightning_bfmoe.layers.coded import CodedNumbers, CodedRotation
from lightning_bfmoe.layers.collect import (
    moe_layers,
    parameter_roles,
    routers,
    set_blend,
    set_loss_scale,
    update_balance,
)
from lightning_bfmoe.layers.correction import LowRankCorrection
from lightning_bfmoe.layers.experts import ButterflyExperts
from lightning_bfmoe.layers.linear import ButterflyLinear
from lightning_bfmoe.layers.moe import ButterflyMoE
from lightning_bfmoe.layers.rotation import Rotation
from lightning_bfmoe.layers.router import Routing, TopKRouter, balance_together
from lightning_bfmoe.layers.substrate import PackedSubstrate, Substrate

__all__ = [
    "ACTIVATIONS",
    "CUSTOM",
    "Activation",
    "ButterflyExperts",
    "ButterflyLinear",
    "ButterflyMoE",
    "CodedNumbers",
    "CodedRotation",
    "LowRankCorrection",
    "PackedSubstrate",
    "Rotation",
    "Routing",
    "Substrate",
    "TopKRouter",
    "attach_loss",
    "balance_together",
    "moe_layers",
    "parameter_roles",
    "routers",
    "set_blend",
    "set_loss_scale",
    "update_balance",
]
