"""include and exclude, and the messages of everything that cannot be meant."""

import pytest
from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.swap import swap_feed_forward
from tests.swap.zoo import EinsumBlock, Plain, make


def paths(model, **kwargs):
    return [b.path for b in swap_feed_forward(model, dry_run=True, **kwargs).blocks]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"include": "transformer.h.1.mlp"}, ["transformer.h.1.mlp"]),
        ({"include": ["*.h.0.*", "*.1.mlp"]}, ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ({"include": r"re:.*\.h\.[1-9]\..*"}, ["transformer.h.1.mlp"]),
        ({"exclude": "*.h.0.*"}, ["transformer.h.1.mlp"]),
        ({"include": "*", "exclude": ["re:transformer.h.1.mlp"]}, ["transformer.h.0.mlp"]),
        ({"exclude": "lm_head"}, ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
    ],
)
def test_patterns(kwargs, expected):
    assert paths(make("gpt2")[0], **kwargs) == expected


def test_a_block_is_named_by_its_slot_or_by_its_owner():
    model, _ = make("bert")
    slot = "encoder.layer.0.intermediate.dense"
    assert paths(model, include=slot) == paths(model, include="encoder.layer.0") == [slot]
    shared = nn.Linear(16, 40)
    block = nn.Sequential(shared, nn.ReLU(), nn.Linear(40, 16))
    model = nn.ModuleDict({"a": block, "b": block})
    assert paths(model, include="b") == ["a"]


def head():
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))


def test_other_widths_are_swapped_when_named():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)), "head": head()}
    )
    assert paths(model) == ["body"]
    assert paths(model, include=["*dy", "head"]) == ["body", "head"]
    assert paths(model, include="re:.*") == ["body", "head"]
    report = swap_feed_forward(model, include="head")
    assert model["head"].d_out == report.blocks[0].d_out == 8
    assert [row["path"] for row in report.skipped] == ["body"]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"include": "transformer.h.7.mlp"}, r"near it are \['transformer\.h\.[01]\.mlp'"),
        (
            {"include": "*.ffn"},
            r"every include pattern must match .*Blocks that can be named:\n  - transformer",
        ),
        ({"include": "transformer.h.0"}, "a GPT2Block with 4 matrices; name a smaller part, or"),
        ({"include": "lm_head"}, "a Linear with 1 matrices, where a block has two or three"),
        ({"include": "transformer.h.0.attn"}, "a GPT2Attention: its forward returns a tuple"),
        ({"include": "re:(h"}, r"after 're:' must be a regular expression: got 're:\(h'"),
        ({"include": [3]}, "include and exclude hold module paths"),
        ({"exclude": "*.mpl"}, "an exclude pattern must match a module"),
        ({"exclude": "*"}, "feed-forward block that is not excluded"),
    ],
)
def test_patterns_that_cannot_be_meant(kwargs, match):
    with pytest.raises(SwapError, match=match):
        swap_feed_forward(make("gpt2")[0], **kwargs)


def test_shapes_that_do_not_chain_are_named():
    model = Plain(nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(41, 16)))
    with pytest.raises(
        SwapError, match=r"(?s)include='mlp'.*do not chain.*\[40, 16\] then \[16, 41\]"
    ):
        swap_feed_forward(model, include="mlp")


def test_a_refused_block_that_is_named_tells_why():
    with pytest.raises(
        SwapError, match=r"include='mlp':\n.*bare weights \(expand \[16, 40\].*register_adapter"
    ):
        swap_feed_forward(Plain(EinsumBlock()), include="mlp")


def test_a_wildcard_does_not_take_what_must_be_named():
    with pytest.raises(
        SwapError, match=r"(?s)a wildcard does not take .*its output is 8 wide.*Write the path"
    ):
        swap_feed_forward(nn.ModuleDict({"head": head()}), include="h*")


def test_nothing_found_lists_what_was_seen_and_the_ways_out():
    model = nn.ModuleDict({"a": EinsumBlock(), "b": EinsumBlock(), "head": head()})
    with pytest.raises(SwapError, match="must have a feed-forward block") as caught:
        swap_feed_forward(model)
    text = str(caught.value)
    assert "a (EinsumBlock): rejected, it holds bare weights" in text
    assert "[and 1 more like it]" in text
    assert "head (Sequential) 16 -> 40 -> 8: by-name" in text
    assert "include='its.path'" in text
    assert "register_adapter" in text
    with pytest.raises(SwapError, match="these candidates: none"):
        swap_feed_forward(nn.Linear(4, 4))


def test_two_blocks_of_one_chain_cannot_both_be_taken():
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU())])
    with pytest.raises(SwapError, match="must not share a matrix: got '0' and '2'"):
        swap_feed_forward(model, include=["0", "2"])
