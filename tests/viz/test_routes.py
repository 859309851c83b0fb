"""Routes of a text: those of the routers; and the map, the view and the planner drawn from them."""

import base64

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bfmoe import (
    ExpertMap,
    MemoryPlanner,
    RoutingView,
    load_packed,
    pack,
    plan_memory,
)
from lightning_bfmoe.data import ByteTokenizer
from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.viz import trace_routes
from lightning_bfmoe.viz.expert_embedding import layer_distances, scale_down, top_tokens
from lightning_bfmoe.viz.expert_picture import expert_svg
from lightning_bfmoe.viz.orbits import distances
from lightning_bfmoe.viz.routes import Routes, split_tokens
from lightning_bfmoe.viz.snapshot import read_angles

TEXT = "the quick brown fox jumps over the lazy dog"


class Model(nn.Module):
    """Two layers with routers and one whose routing is its own."""

    def __init__(self, experts: int = 6):
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.first = ButterflyMoE(16, 24, num_experts=experts, top_k=2, seed=1, router_noise=1.0)
        self.second = ButterflyMoE(16, 24, num_experts=4, top_k=1, seed=2)
        self.own = ButterflyExperts(16, 24, num_experts=3)
        with torch.no_grad():
            self.first.router.weight.normal_()

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.first(x)
        x = x + self.second(x)
        rows = x.reshape(-1, 16)
        experts = (ids.reshape(-1, 1) % 3).repeat(1, 2)
        return rows + self.own(rows, experts, weights=torch.full(experts.shape, 0.5))


def test_routes_are_those_of_the_routers():
    model = Model().train()
    model.second.eval()
    routes = trace_routes(model, ByteTokenizer(), TEXT, context=10)
    assert routes.pieces == list(TEXT) and routes.ids == list(TEXT.encode())
    assert routes.num_experts == {"first": 6, "second": 4, "own": 3}
    assert model.training and model.first.training and not model.second.training
    assert all(not module._forward_hooks for module in model.modules())
    assert model.first.router.pending_load.sum() == 0
    model.eval()
    model(torch.tensor([routes.ids]))
    expected = model.first.last_routing
    order = expected.weights.argsort(dim=1, descending=True)
    assert routes.experts["first"].tolist() == expected.experts.gather(1, order).tolist()
    np.testing.assert_allclose(
        routes.weights["first"], expected.weights.gather(1, order), rtol=1e-6
    )
    assert routes.load("first").tolist() == expected.load.tolist()
    assert routes.experts["own"][:, 0].tolist() == [i % 3 for i in routes.ids]


def test_a_packed_model_is_shown_too(tmp_path):
    model = nn.Sequential(nn.Embedding(256, 16), ButterflyMoE(16, 24, num_experts=6)).eval()
    pack(model, tmp_path / "model.bfmoe", angles="int8", finalize=True)
    fresh = nn.Sequential(nn.Embedding(256, 16), ButterflyMoE(16, 24, num_experts=6))
    packed = load_packed(tmp_path / "model.bfmoe", model=fresh)
    tokens = ByteTokenizer()
    expected = trace_routes(model, tokens, TEXT).experts["1"]
    assert trace_routes(packed, tokens, TEXT).experts["1"].tolist() == expected.tolist()
    np.testing.assert_allclose(layer_distances(packed, "1"), layer_distances(model, "1"), atol=0.02)


def test_a_failing_model_is_left_as_it_was():
    model = Model().train()

    def broken(ids):
        model(ids)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trace_routes(model, ByteTokenizer(), TEXT, forward=broken)
    assert model.training and all(not module._forward_hooks for module in model.modules())


def test_what_cannot_be_traced_is_an_error():
    with pytest.raises(ConfigError, match="Linear without one"):
        trace_routes(nn.Linear(2, 2), ByteTokenizer(), TEXT)
    with pytest.raises(ConfigError, match="has encode and decode: got dict"):
        trace_routes(Model(), {}, TEXT)
    with pytest.raises(ConfigError, match="a text to route has tokens"):
        trace_routes(Model(), ByteTokenizer(), "")
    model = Model()
    twice = lambda ids: model(torch.cat([ids, ids]))  # noqa: E731
    with pytest.raises(ShapeError, match="sees each token of the text once: got 20 rows for 10"):
        trace_routes(model, ByteTokenizer(), TEXT, forward=twice, context=10)
    with pytest.raises(ConfigError, match="path of a ButterflyMoE layer: got third"):
        RoutingView(model, ByteTokenizer(), layer="third")


def test_tokenizers_of_the_ecosystem():
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "be": 1, "?": 2}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert split_tokens(tokenizer, "to be or") == ([0, 1, 2], ["to", "be", "?"])

    class Listed:  # as those of transformers
        def encode(self, text):
            return [5, 6]

        def decode(self, ids):
            return {5: "", 6: "x"}[ids[0]]

    assert split_tokens(Listed(), "x") == ([5, 6], ["[5]", "x"])


def test_distances_of_a_layer_are_the_mean_over_its_rotations():
    model = Model()
    linears = model.first.experts.linears().values()
    squares = [
        distances(read_angles(rotation).float().numpy(), rotation.d).values ** 2
        for linear in linears
        for rotation in (linear.rotate_in, linear.rotate_out)
    ]
    expected = np.sqrt(sum(squares) / len(squares))
    np.testing.assert_allclose(layer_distances(model, "first"), expected)


def test_a_plane_is_found_again():
    points = np.random.default_rng(0).normal(size=(9, 2))
    gaps = np.linalg.norm(points[:, None] - points, axis=-1)
    found, explained = scale_down(gaps)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found, axis=-1), gaps, atol=1e-9)
    assert explained == pytest.approx(1)
    assert scale_down(np.zeros((3, 3)))[1] == 1 and scale_down(np.zeros((1, 1)))[0].shape == (1, 2)
    assert scale_down(1 - np.eye(20))[1] == pytest.approx(2 / 19)


def test_top_tokens_are_those_an_expert_takes_more_than_its_share():
    pieces = ["a"] * 6 + ["b"] * 6
    experts = np.array([0] * 6 + [0, 1, 1, 1, 1, 1])[:, None]
    routes = Routes([0] * 12, pieces, {"x": experts}, {}, {"x": 3})
    assert top_tokens(routes, "x", 5) == [[("a", 6)], [("b", 5)], []]


@pytest.mark.parametrize("build", [ExpertMap, RoutingView])
def test_views_have_their_layers_and_their_picture(build):
    view = build(Model(), ByteTokenizer(), TEXT + " <&>")
    before = view.children[-1].value
    view.layer.value = "second"
    assert view.children[-1].value != before and "<&>" not in before
    bundle, _ = view._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"])[1:4] == b"PNG"
    assert "second" in bundle["text/plain"]


def test_a_new_sentence_is_routed_and_a_bad_one_is_said():
    view = RoutingView(Model(), ByteTokenizer(), "ab", layer="first")
    view.text.value = "xyz"
    assert view.routes.pieces == ["x", "y", "z"]
    for experts in view.routes.experts["first"]:
        assert f"<small>{experts[0]} {experts[1]}</small>" in view.children[-1].value
    view.text.value = ""
    assert "a text to route has tokens" in view.children[-1].value
    assert view.routes.pieces == ["x", "y", "z"]


def test_the_map_shows_every_expert_with_its_tokens():
    view = ExpertMap(Model(), ByteTokenizer(), TEXT, layer="first", top=3)
    svg = expert_svg(view.embedding, "first")
    assert svg.count("<circle") == 6 and svg.count('class="tip') == 6
    assert view.embedding.relative_load.mean() == pytest.approx(1)
    for tokens in view.embedding.top:
        assert len(tokens) <= 3 and all(f"\u00d7{count}" in svg for _, count in tokens)
    (points,) = [c for c in view.figure().axes[0].collections if len(c.get_offsets()) == 6]
    np.testing.assert_allclose(points.get_offsets(), view.embedding.points)


def test_the_planner_shows_the_numbers_of_plan_memory():
    planner = MemoryPlanner(768, 3072, 16, 2, layers=12, device="rpi4", gains=True)
    planner.sliders["num_experts"].value = 64
    planner.sliders["angle_bits"].value = 4
    plan = plan_memory(768, 3072, 64, 2, layers=12, angle_bits=4, gains=True)
    assert planner.plan == plan
    table = planner.children[-1].value
    for form in ("moe_fp32", "moe_ternary"):
        assert f"{plan.ratio(form):.1f}\u00d7" in table
    bars = [bar.get_width() for bar in planner.figure().axes[0].patches]
    assert bars == [plan.bytes(form) for form in plan.parts]
    planner.sliders["top_k"].value = 16
    planner.sliders["num_experts"].value = 8
    assert "top_k must be at most num_experts" in planner.children[-1].value
    with pytest.raises(ConfigError, match="top_k must be at most"):
        MemoryPlanner(num_experts=2, top_k=4)
