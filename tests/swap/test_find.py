"""What is recognised and what is refused, and with which reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_bfmoe.layers import moe_layers, set_blend
from lightning_bfmoe.swap import find_feed_forward, swap_feed_forward
from lightning_bfmoe.swap.blocks import NotFeedForwardError
from lightning_bfmoe.swap.probe import probe_block
from lightning_bfmoe.swap.quiet import keep_rng, quiet
from tests.swap.zoo import (
    W123,
    EinsumBlock,
    Plain,
    Square,
    TimmMlp,
    Weird,
    make,
    mixtral,
    relative,
    run,
)


def only(model):
    found = find_feed_forward(model)
    assert len(found) == 1
    return found[0]


class Block(nn.Module):
    """up, act and down as a function of the forward that a test gives."""

    def __init__(self, forward, d=16, hidden=40, **modules):
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        for name, module in modules.items():
            setattr(self, name, module)
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


def test_roles_are_proved_not_read_from_names():
    block = Square()
    found = probe_block(block)
    assert torch.equal(found.gate, block.w1.weight)
    assert torch.equal(found.up, block.w2.weight)
    assert torch.equal(found.down, block.w3.weight)
    swiglu = W123()
    assert torch.equal(probe_block(swiglu).gate, swiglu.w1.weight)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_two_forms_of_gelu_are_told_apart_at_small_weights(approximate):
    block = Block(lambda m, x: m.down(F.gelu(m.up(x), approximate=approximate)))
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(0.01)
    assert probe_block(block).activation == {"none": "gelu", "tanh": "gelu_tanh"}[approximate]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_two_forms_of_gelu_are_told_apart_in_low_precision(approximate, dtype):
    block = Block(lambda m, x: m.down(F.gelu(m.up(x), approximate=approximate)), d=32, hidden=96)
    found = probe_block(block.to(dtype)).activation
    assert found == {"none": "gelu", "tanh": "gelu_tanh"}[approximate]


@pytest.mark.parametrize("name", ["relu", "silu", "gelu"])
def test_a_block_of_zeros_is_still_told_apart(name):
    block = Block(lambda m, x: m.down(getattr(F, name)(m.up(x))))
    nn.init.zeros_(block.down.weight)
    assert probe_block(block).activation == name
    assert not bool(block.down.weight.any())


def test_the_roles_of_equal_matrices_are_told_apart_by_random_ones():
    block = Square()
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    assert probe_block(block).gate.data_ptr() == block.w1.weight.data_ptr()


def test_weights_under_a_parametrization_are_read():
    block = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 40)), nn.ReLU(), nn.Linear(40, 16)
    )
    model = Plain(block).eval()
    ids = torch.arange(6).reshape(1, 6)
    wanted = run(model, ids)
    swap_feed_forward(model, angle_std=0.0)
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) < 1e-5


def test_two_axis_blocks_are_probed_too():
    def rule(m, x):
        rows, _ = x.shape
        return m.down(m.up(x).relu()).reshape(rows, -1)

    assert only(Plain(Block(rule))).status == "ready"


@pytest.mark.parametrize(
    ("rule", "modules", "reason"),
    [
        (lambda m, x: x + m.down(m.up(x).relu()), {}, "neither down"),
        (lambda m, x: m.down(m.norm(m.up(x)).relu()), {"norm": nn.LayerNorm(40)}, "neither down"),
        (lambda m, x: m.down(torch.celu(m.up(x), 2.0)), {}, "neither down"),
        (lambda m, x: (m.down(m.up(x).relu()), None), {}, "returns a tuple, not one tensor"),
        (lambda m, x: m.down(m.up(x).relu()).mean(1), {}, "to [2, 16]"),
        (lambda m, x: m.down(m.up(x.hidden).relu()), {}, "raises AttributeError"),
        (
            lambda m, x: m.down(m.up(m.drop(x)).relu()),
            {"drop": nn.Dropout(0.1)},
            "(p=0.1) is neither on the hidden units nor on the output",
        ),
        (
            lambda m, x: m.down(m.up(x).relu()) * (torch.rand(()) if m.training else 1.0),
            {},
            "in training mode it changes by more than its dropout",
        ),
        (
            lambda m, x: m.down(m.up(x).relu()) if not m.training else m.no(x),
            {},
            "in training mode it raises",
        ),
    ],
)
def test_a_block_that_computes_something_else_is_refused(rule, modules, reason):
    found = only(Plain(Block(rule, **modules)))
    assert (found.status, found.path) == ("rejected", "mlp")
    assert reason in found.reason


def test_bare_weights_and_convolutions_are_named_with_a_way_out():
    found = only(Plain(EinsumBlock()))
    assert found.status == "rejected"
    assert found.reason == (
        "it holds bare weights (expand [16, 40], shrink [40, 16]) and no linear modules; "
        "use register_adapter"
    )
    conv = nn.Sequential(nn.Conv1d(16, 40, 1), nn.ReLU(), nn.Conv1d(40, 16, 1))
    assert "1x1 convolutions" in only(Plain(conv)).reason


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8)], "its output is 8 wide, its input 16"),
        ([nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)], "it is a bottleneck (16 -> 4 -> 16)"),
        ([nn.Linear(16, 40), nn.Linear(40, 16)], "no activation stands between its matrices"),
    ],
)
def test_what_is_only_swapped_by_name(layers, reason):
    for model in (nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Sequential(*layers))):
        found = only(model)
        assert (found.status, found.reason) == ("by-name", reason)


def test_a_chain_of_matrices_is_only_swapped_by_name():
    model = nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    found = find_feed_forward(model)
    assert [(c.path, c.status) for c in found] == [("0", "by-name"), ("2", "by-name")]
    swap_feed_forward(model, include="2")
    assert [type(m).__name__ for m in model] == [
        "Linear",
        "ReLU",
        "ButterflyMoE",
        "Identity",
        "Identity",
    ]


def test_the_smallest_enclosing_module_is_taken():
    inner = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
    model = nn.Sequential(
        nn.LayerNorm(16), nn.Sequential(nn.Identity(), nn.ModuleDict({"net": inner})["net"])
    )
    assert only(model).path == "1.1"


def test_a_sequential_of_sequentials_is_taken_as_a_whole():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Dropout(0.1)), nn.Linear(40, 16)
    )
    found = only(Plain(net))
    assert (found.path, found.block.dropout) == ("mlp", 0.1)


def test_the_model_itself_cannot_be_replaced():
    found = only(TimmMlp())
    assert (found.status, found.reason) == (
        "rejected",
        "the model itself is the block; put it into a parent module",
    )


def test_attention_is_no_noise_and_layers_in_a_model_come_in_order():
    model, _ = make("gpt2")
    assert [c.path for c in find_feed_forward(model)] == [
        "transformer.h.0.mlp",
        "transformer.h.1.mlp",
    ]
    assert [c.family for c in find_feed_forward(mixtral())] == ["experts", "experts"]


def test_a_candidate_describes_itself():
    found = only(nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8)))
    assert found.describe() == (
        "0 (Sequential in the model) 16 -> 40 -> 8: by-name, its output is 8 wide, its input 16"
    )


def test_quiet_puts_everything_back_after_an_exception():
    block = Weird().train()
    weight = block.a.weight
    with pytest.raises(RuntimeError, match="on purpose"), quiet(block):
        assert not block.training
        block.a._parameters["weight"] = nn.Parameter(torch.zeros(1))
        block.extra = 1
        raise RuntimeError("on purpose")
    assert block.training
    assert block.a.weight is weight
    assert not hasattr(block, "extra")


def test_keep_rng_also_after_an_exception():
    before = torch.get_rng_state()
    with pytest.raises(NotFeedForwardError, match="stop"), keep_rng():
        torch.rand(3)
        raise NotFeedForwardError("stop")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_block_is_passed_over():
    model = nn.Sequential(torch.jit.trace(TimmMlp().eval(), torch.randn(1, 16)))
    assert find_feed_forward(model) == []
    assert list(moe_layers(model)) == []
