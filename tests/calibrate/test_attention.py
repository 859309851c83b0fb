"""Attention in a selection: where it stands, what is added by whom, and taking it out exactly."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_bfmoe import load_packed, pack, restore
from lightning_bfmoe.calibrate.attention import CACHED, INSIDE, SECOND, find_attention, keeps_cache
from lightning_bfmoe.calibrate.observe import evaluating
from lightning_bfmoe.calibrate.streams import watch_streams
from lightning_bfmoe.layers.bypass import LinearBypass, bypasses
from lightning_bfmoe.selecting import ROUTED
from lightning_bfmoe.swap import apply_swap_plan, plan_from_state_dict
from tests.calibrate.test_calibrated_swap import ids, quiet
from tests.calibrate.test_selected import LINEAR, rows_of, select
from tests.swap.zoo import SIZES, W123, Plain, TorchStack, make, mixtral, relative, run, state


def build(name):
    """A small model and where its first attention starts."""
    torch.manual_seed(0)
    if name == "mpnet":
        config = transformers.MPNetConfig(**SIZES, max_position_embeddings=32)
        return transformers.MPNetModel(config).eval(), "encoder.layer.0.attention.attn"
    if name == "bert":
        return make("bert")[0], "encoder.layer.0.attention.self"
    first = name == "norm first"
    return TorchStack(batch_first=True, norm_first=first).eval(), "encoder.layers.0.self_attn"


@pytest.mark.parametrize("name", ["bert", "mpnet", "norm last", "norm first"])
def test_its_error_is_that_of_the_residual_stream(name):
    model, path = build(name)
    probe = ids(1)[0].clamp(min=2)  # MPNet's padding is all zeros
    (place,) = [s for s in find_attention(model, lambda _: _width(name)) if s.path == path]
    stream = watch_streams(model, [place], [(probe, False), (probe, True)])[path]
    end = place.end or path
    call = lambda: run(model, probe)  # noqa: E731
    with evaluating(model):  # torch's encoders call their modules, as in training
        x, _ = rows_of(model.get_submodule(path), call)
        y = rows_of(model.get_submodule(end), call)[1]
        r = x
        if name == "norm first":
            r, _ = rows_of(model.get_submodule("encoder.layers.0.norm1"), call)
    assert stream.post_norm == (name != "norm first")
    miss = (y - 0.3).square().sum(1) / (r + y).square().sum(1)
    found = stream.eps(lambda x: torch.full_like(x, 0.3))
    assert found == pytest.approx(float(miss.mean()), rel=1e-4)
    ratio = (y.norm(dim=1) / r.norm(dim=1)).mean()
    assert stream.norm_ratio == pytest.approx(float(ratio), rel=1e-4)


def _width(name):
    return 32 if name in ("bert", "mpnet") else 16


@pytest.mark.parametrize("name", ["bert", "mpnet", "norm last", "norm first"])
def test_it_is_taken_out_saved_packed_and_put_back(name, tmp_path):
    model, path = build(name)
    probe = ids(1)[0]
    before, modules, wanted = state(model), list(model.named_modules()), run(model, probe)
    report = select(model, sparsity=1.0, options=LINEAR, attention_rank=8)
    taken = {r.path: r for r in report.submodules if r.chosen != "keep"}
    assert path in taken and isinstance(model.get_submodule(path), LinearBypass)
    if name == "bert":
        layer = model.encoder.layer[0].attention
        assert isinstance(layer.output.dense, nn.Identity)
    got = run(model, probe)
    assert 0 < relative(got, wanted) < 1.0
    fresh, _ = build(name)
    apply_swap_plan(fresh, plan_from_state_dict(model.state_dict()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, probe), got)
    restore(model, report.swap)
    assert list(model.named_modules()) == modules
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if torch.is_tensor(before[k]))
    assert torch.equal(run(model, probe), wanted)


def test_the_size_of_split_attention_counts_both_parts():
    model, path = build("bert")
    layer = model.encoder.layer[0].attention
    parts = [*layer.self.parameters(), *layer.output.dense.parameters()]
    report = select(model, sparsity=0.2, options=LINEAR, dry_run=True)
    row = next(r for r in report.submodules if r.path == path)
    assert row.size_before == 4 * sum(p.numel() for p in parts)


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_padded_batches_go_through_a_torch_encoder_without_attention(which):
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    model = nn.ModuleDict({"embed": nn.Embedding(64, 16), "net": encoder})
    data = ids()
    mask = torch.zeros(data[0].shape, dtype=torch.bool)
    mask[:, 5:] = True
    feed = lambda m, b: m["net"](m["embed"](b), src_key_padding_mask=mask)  # noqa: E731
    twin = copy.deepcopy(model)
    seen = select(
        twin, sparsity=1.0, options=LINEAR, attention_rank=8,
        calibration=quiet(forward_fn=feed, mask_fn=lambda b: ~mask),
    )  # fmt: skip
    assert [r.chosen != "keep" for r in seen.submodules] == [True] * 4
    paths = {f"net.layers.{at}.self_attn" for at in which}
    plan = seen.plan()
    plan["replacements"] = [e for e in plan["replacements"] if e["path"] in paths]
    one = copy.deepcopy(model)
    apply_swap_plan(one, plan)
    assert len(bypasses(one)) == len(which)
    with torch.no_grad():
        for found in (feed(twin.eval(), data[0]), feed(one.eval(), data[0])):
            assert found.shape == (*data[0].shape, 16) and torch.isfinite(found[:, :5]).all()
    assert one["net"].use_nested_tensor is False
    assert twin["net"].use_nested_tensor is False


def test_what_cannot_be_told_apart_is_said_in_the_report():
    class OneAttention(nn.Module):  # projections, addition and norm in one forward, as in ALBERT
        def __init__(self):
            super().__init__()
            self.project, self.LayerNorm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x):
            return self.LayerNorm(x + self.project(x.cumsum(1)))

    model = Plain(nn.Sequential(OneAttention(), W123()))
    report = select(model, sparsity=1.0, options=LINEAR, dry_run=True)
    row = next(r for r in report.submodules if r.kind == "attention")
    assert row.chosen == "keep" and row.note == INSIDE
    assert f"kept: {row.path}: {INSIDE}" in " ".join(str(report).split())


def test_cross_attention_is_kept_and_said():
    model = TorchStack(batch_first=True).eval()
    report = select(model, sparsity=1.0, options=LINEAR, dry_run=True)
    notes = {r.path: r.note for r in report.submodules}
    assert notes["decoder.layers.0.multihead_attn"] == SECOND
    assert "decoder.layers.0.self_attn" in {r.path for r in report.submodules if r.chosen != "keep"}
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    found = find_attention(transformers.BertModel(config), lambda _: 32)
    assert {s.path.rpartition(".")[2] for s in found} == {"self"} or SECOND in {
        s.refused for s in found
    }


@pytest.mark.parametrize(
    ("name", "path", "wanted"),
    [
        ("llama", "model.layers.0.self_attn", True),
        ("gpt2", "transformer.h.0.attn", True),
        ("bert", "encoder.layer.0.attention.self", False),
        ("encoder", "encoder.layers.0.self_attn", False),
    ],
)
def test_where_a_cache_counts(name, path, wanted):
    assert keeps_cache(make(name)[0].get_submodule(path)) == wanted


def test_a_selected_encoder_is_packed(tmp_path):
    model, _ = build("bert")
    report = select(model, sparsity=1.0, attention_rank=4)
    assert bypasses(model)
    pack(model, tmp_path / "m.bfmoe", angles="fp32")
    fresh, _ = build("bert")
    apply_swap_plan(fresh, report.plan())
    load_packed(tmp_path / "m.bfmoe", fresh)
    assert relative(run(fresh, ids(1)[0]), run(model, ids(1)[0])) < 1e-6


def test_in_an_encoder_decoder_the_decoders_first_is_kept():
    report = select(make("bart")[0], sparsity=1.0, options=LINEAR, dry_run=True)
    kept = {r.path: r.note for r in report.submodules if r.chosen == "keep"}
    assert kept["decoder.layers.0.self_attn"] == CACHED
    assert kept["decoder.layers.0.encoder_attn"] == "it reads a second stream"
    assert "encoder.layers.0.self_attn" not in kept


def test_experts_with_a_router_of_their_own_are_listed_and_their_attention_ranked():
    model = mixtral().eval()
    report = select(model, sparsity=1.0, attention_rank=4, dry_run=True)
    rows = {(r.kind, r.chosen): r for r in report.submodules}
    assert rows["feed-forward", "keep"].note == ROUTED
    assert rows["attention", "bypass"].eps["bypass"] < 1
    assert ROUTED in " ".join(str(report).split())


def test_blocks_that_were_left_out_are_said_too():
    model, _ = make("llama")
    report = select(model, sparsity=1.0, options=LINEAR, exclude="model.layers.0.mlp", dry_run=True)
    assert [row["path"] for row in report.skipped] == ["model.layers.0.mlp"]
    assert "kept: model.layers.0.mlp: not ranked" in " ".join(str(report).split())
    assert report.to_dict()["skipped"] == report.skipped
