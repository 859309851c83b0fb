"""Teaching unknown blocks, and the families that ship."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import moe_layers, set_blend
from lightning_bfmoe.swap import (
    FeedForward,
    find_feed_forward,
    register_adapter,
    remove_adapter,
    restore,
    swap_feed_forward,
)
from tests.swap.zoo import SIZES, EinsumBlock, Plain, relative, run


@pytest.fixture
def teach():
    taught = []

    def register(*args, **kwargs):
        taught.append(register_adapter(*args, **kwargs))
        return taught[-1]

    yield register
    for adapter in taught:
        remove_adapter(adapter)


def read_einsum(m):
    return FeedForward(up=m.expand.T, down=m.shrink.T, activation="relu")


def test_a_taught_block_is_swapped_and_restored(teach):
    teach(EinsumBlock, read_einsum)
    model = Plain(EinsumBlock()).eval()
    ids = torch.arange(10).reshape(2, 5)
    wanted = run(model, ids)
    report = swap_feed_forward(model, angle_std=0.0)
    assert report.blocks[0].family == "EinsumBlock"
    assert report.blocks[0].parameters_before == 2 * 16 * 40
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) < 1e-5
    restore(model, report)
    assert torch.equal(run(model, ids), wanted)


def test_a_wrong_description_is_refused(teach):
    teach(EinsumBlock, lambda m: FeedForward(up=m.expand.T, down=m.shrink.T, activation="silu"))
    with pytest.raises(SwapError, match=r"the adapter describes a function that is off by \d+"):
        swap_feed_forward(Plain(EinsumBlock()))


def test_a_description_with_wrong_shapes_is_refused(teach):
    teach(
        EinsumBlock,
        lambda m: FeedForward(up=m.expand, down=m.shrink, activation="relu"),
        family="mine",
    )
    found = find_feed_forward(Plain(EinsumBlock()))[0]
    assert found.family == "mine"
    assert "maps shape" in found.reason or "raises" in found.reason
    with pytest.raises(SwapError, match=r"must chain: .* got up \[16, 40\], down \[16, 40\]"):
        FeedForward(up=torch.ones(16, 40), down=torch.ones(16, 40))


class Inline(nn.Module):
    """A transformer layer that keeps its block's matrices for itself."""

    def __init__(self, d=16):
        super().__init__()
        self.norm, self.grow, self.shrink = nn.LayerNorm(d), nn.Linear(d, 40), nn.Linear(40, d)
        self.squash, self.fused = F.softplus, True

    def forward(self, x):
        return x + self.shrink(self.squash(self.grow(self.norm(x))))


def read_inline(m):
    return FeedForward(
        up=m.grow.weight,
        up_bias=m.grow.bias,
        down=m.shrink.weight,
        down_bias=m.shrink.bias,
        activation=m.squash,
        activation_at="squash",
    )


def test_an_adapter_for_a_block_without_a_module_of_its_own(teach):
    teach(
        lambda m: isinstance(m, Inline),
        read_inline,
        family="inline",
        layer_at="grow",
        identities=["squash", "shrink"],
        attributes={"fused": False},
        forward=lambda m, x: m.shrink(m.squash(m.grow(x))),
    )
    model = Plain(Inline()).eval()
    ids = torch.arange(10).reshape(2, 5)
    wanted = run(model, ids)
    report = swap_feed_forward(model, angle_std=0.0)
    assert [path for path, _ in moe_layers(model)] == ["mlp.grow"]
    assert model.mlp.fused is False
    assert report.placements[0]["layer"]["activation"] == {"identity": 0}
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) < 1e-5
    restore(model, report)
    assert model.mlp.squash is F.softplus
    assert model.mlp.fused is True
    assert torch.equal(run(model, ids), wanted)


def test_an_unnamed_activation_must_say_where_it_stands(teach):
    teach(
        Inline,
        lambda m: FeedForward(up=m.grow.weight, down=m.shrink.weight, activation=F.softplus),
        layer_at="grow",
    )
    with pytest.raises(SwapError, match="an activation without a name must stand in the model"):
        swap_feed_forward(Plain(Inline()))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: register_adapter("Inline", read_inline), "needs a class or predicate"),
        (lambda: register_adapter(Inline, None), "needs a class or predicate"),
        (
            lambda: FeedForward(torch.ones(8, 4), torch.ones(4, 8), activation="mesh")(
                torch.ones(1, 4)
            ),
            "known name",
        ),
    ],
)
def test_misuse(call, match):
    with pytest.raises(SwapError, match=match):
        call()


def test_an_adapter_is_removed_once():
    adapter = register_adapter(Inline, read_inline)
    remove_adapter(adapter)
    with pytest.raises(SwapError, match="only a registered adapter can be removed: got Inline"):
        remove_adapter(adapter)


def _config(name, **changes):
    return getattr(transformers, f"{name}Config")(**{**SIZES, **changes})


HF = {
    "OPT": lambda: transformers.OPTModel(_config("OPT", ffn_dim=48, word_embed_proj_dim=32)),
    "T5": lambda: transformers.T5EncoderModel(
        _config(
            "T5",
            d_model=32,
            d_ff=48,
            num_layers=1,
            num_heads=2,
            d_kv=16,
            feed_forward_proj="gated-gelu",
        )
    ),
    "Phi3": lambda: transformers.Phi3Model(
        _config("Phi3", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "DistilBert": lambda: transformers.DistilBertModel(
        _config("DistilBert", dim=32, hidden_dim=48, n_layers=1, n_heads=2)
    ),
    "Qwen2Moe": lambda: transformers.Qwen2MoeModel(
        _config(
            "Qwen2Moe",
            num_key_value_heads=2,
            moe_intermediate_size=16,
            num_experts=4,
            shared_expert_intermediate_size=48,
        )  # fmt: skip
    ),
}


@pytest.mark.filterwarnings("ignore:.*do not fit an orbit:UserWarning")
@pytest.mark.parametrize("name", HF)
def test_further_hugging_face_families(name):
    torch.manual_seed(0)
    model, ids = HF[name]().eval(), torch.arange(12).reshape(2, 6)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.dim() == 3:  # equal experts
                p.data.copy_(p.data[:1].expand_as(p))
    wanted = run(model, ids)
    report = swap_feed_forward(model, angle_std=0.0)
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) < 1e-5
    restore(model, report)
    assert torch.equal(run(model, ids), wanted)
