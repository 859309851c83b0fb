"""A small language model, dense and swapped by hand, and what its packed copy must compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bfmoe.deploy.coding import store_angles, wrap_angles
from lightning_bfmoe.functional import decode_codes, encode_codes
from lightning_bfmoe.layers import ButterflyMoE, Rotation, moe_layers, set_blend
from lightning_bfmoe.layers.surgery import apply_replacement, replacement

D, F_, VOCAB = 12, 20, 11


class Block(nn.Module):
    """A feed-forward block that is no module of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, F_), nn.Linear(F_, D)
        self.act, self.fast = F.gelu, True

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Model(nn.Module):
    """Embedding tied to the head, two different blocks and a shared one, a buffer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[1])
        self.head = nn.Linear(D, VOCAB)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def swap_by_hand(model, **settings):
    """Every block's two matrices become one ButterflyMoE, noted down as swap/ does it."""
    for number in range(2):
        path = f"blocks.{number}."
        layer = ButterflyMoE(D, F_, num_experts=3, seed=number, **settings)
        entry = replacement(
            path + "fc1",
            identities=[path + "fc2", path + "act"],
            attributes={path + "fast": False},
        )
        apply_replacement(model, entry, layer)
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for name, tensor in layer.named_parameters():
                if "gain" in name or "bias" in name:
                    tensor.normal_(1.0, 0.1)
            layer.router.balance_bias.normal_()
    return model


DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def rounded(model, angles="fp16", gains=None):
    """A copy at lambda 1 whose angles and gains hold what the file stores."""
    gains = gains or ("fp32" if angles == "fp32" else "fp16")

    def stored(values, encoding, offset):
        if encoding in DTYPES:
            store = values.to if offset else lambda dtype: store_angles(values, dtype)
            return store(DTYPES[encoding]).float()
        wide = values if offset else wrap_angles(values)
        return decode_codes(*encode_codes(wide, int(encoding[3:]), offset), offset)

    model = copy.deepcopy(model).eval()
    set_blend(model, 1.0)
    for module in model.modules():
        if isinstance(module, Rotation):
            module.angles.data = stored(module.angles.data, angles, 0.0)
        for name in ("gain_in", "gain_out"):
            if getattr(module, name, None) is not None:
                gain = getattr(module, name)
                gain.data = stored(gain.data, gains, 1.0)
    return model


@pytest.fixture
def dense():
    """Makes a fresh dense model; another one at every call."""
    return Model


@pytest.fixture
def swapped():
    """Makes a swapped model, with settings of the layer."""
    return lambda **settings: swap_by_hand(Model(), **settings)


@pytest.fixture
def as_stored():
    """See `rounded`."""
    return rounded


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.bfmoe"
