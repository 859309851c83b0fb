"""`selected_swap` on models of real library classes: scores, budgets, surgery, and what follows."""

import copy
import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bfmoe import (
    AngleWarmup,
    Calibration,
    TernarySchedule,
    load_from_checkpoint,
    load_packed,
    pack,
    restore,
)
from lightning_bfmoe.calibrate.streams import Submodule, watch_streams
from lightning_bfmoe.errors import CalibrationError, ConfigError, SwapError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.layers.bypass import LinearBypass, bypasses
from lightning_bfmoe.plan import Plan
from lightning_bfmoe.selected import selected_swap
from lightning_bfmoe.swap import apply_swap_plan, plan_from_state_dict, swap_feed_forward
from tests.calibrate.test_calibrated_swap import ids, quiet
from tests.swap.zoo import W123, Plain, make, relative, run, state

LINEAR = ("keep", "bypass", "remove")


def select(model, **settings):
    settings = {"num_experts": 4, "calibration": quiet(), **settings}
    return selected_swap(model, ids(), **settings)


def rows_of(module, call):
    """Inputs and outputs of a module while `call` runs, flattened, in double."""
    seen = []

    def hook(module, args, kwargs, output):
        x = kwargs.get("hidden_states", args[0] if args else None)
        y = output[0] if isinstance(output, tuple) else output
        seen.append([t.detach().double().flatten(0, 1) for t in (x, y)])

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "path", "residual"),
    [
        ("llama", "model.layers.1.mlp", "model.layers.1.post_attention_layernorm"),
        ("llama", "model.layers.1.self_attn", "model.layers.1.input_layernorm"),
        ("gpt2", "transformer.h.0.mlp", "transformer.h.0.ln_2"),
        ("bert", "encoder.layer.0.intermediate.dense", None),  # its input is the residual
    ],
)
def test_errors_are_those_of_the_residual_stream(name, path, residual):
    model, probe = make(name)
    report = select(model, sparsity=0.01, options=LINEAR, dry_run=True)
    row = next(r for r in report.submodules if r.path == path)
    kind = row.kind
    batches = [(probe, False), (probe, True)]
    block = None
    if name == "bert":
        layer = model.encoder.layer[0]
        block = lambda x: layer.output.dense(layer.intermediate(x))  # noqa: E731
    place = Submodule(path, kind, 32, block)
    stream = watch_streams(model, [place], batches)[path]
    x, y = rows_of(model.get_submodule(path), lambda: run(model, probe))
    if block is not None:
        y = block(x.float()).detach().double()
    r = (
        x
        if residual is None
        else rows_of(model.get_submodule(residual), lambda: run(model, probe))[0]
    )
    assert stream.post_norm == (residual is None)
    miss = (y - 0.3).square().sum(1) / (r + y).square().sum(1)
    assert stream.eps(lambda x: torch.full_like(x, 0.3)) == pytest.approx(
        float(miss.mean()), rel=1e-5
    )
    cosine = torch.cosine_similarity(r, r + y, dim=1)
    assert stream.one_minus_cosine == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    ratio = (y.norm(dim=1) / r.norm(dim=1)).mean()
    assert stream.norm_ratio == pytest.approx(float(ratio), rel=1e-5)


def test_a_parallel_block_has_one_residual_for_both_parts():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.last = (
                nn.Embedding(64, 16),
                nn.LayerNorm(16),
                nn.LayerNorm(16),
            )
            self.mlp, self.other = W123(), W123()

        def forward(self, ids):
            x = self.embed(ids)
            h = self.norm(x)
            return self.last(x + self.mlp(h) + self.other(h))

    model = Parallel()
    places = [Submodule(p, "feed-forward", 16, model.get_submodule(p)) for p in ("mlp", "other")]
    batch = ids(1)[0]
    streams = watch_streams(model, places, [(batch, False), (batch, True)])
    x = model.embed(batch).detach().flatten(0, 1)
    for path, stream in streams.items():
        y = model.get_submodule(path)(model.norm(x)).detach()
        ratio = (y.norm(dim=1) / x.norm(dim=1)).mean()
        assert stream.norm_ratio == pytest.approx(float(ratio), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "encoder", "timm"])
def test_it_replaces_and_is_undone_exactly(name):
    model, probe = make(name)
    before, modules, wanted = state(model), list(model.named_modules()), run(model, probe)
    report = select(model, sparsity=0.6)
    assert any(r.chosen != "keep" for r in report.submodules)
    assert 0 < relative(run(model, probe), wanted) < 0.5
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert norms or name == "timm"
    assert not any(m._forward_hooks for m in norms)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "Selection" in str(report) and report.figure().axes
    restore(model, report.swap)
    assert list(model.named_modules()) == modules
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if torch.is_tensor(before[k]))
    assert torch.equal(run(model, probe), wanted)


def test_a_dry_run_and_an_interruption_leave_the_model_untouched():
    model, probe = make("llama")
    modules, wanted, flags = list(model.named_modules()), run(model, probe), []
    report = select(model, sparsity=0.5, dry_run=True)
    assert report.swap is None and list(model.named_modules()) == modules

    def forward(model, batch):
        flags.append(1)
        if len(flags) > 14:
            raise KeyboardInterrupt("by hand")
        model(batch)

    with pytest.raises(KeyboardInterrupt, match="by hand"):
        select(model, sparsity=0.5, calibration=quiet(forward_fn=forward))
    assert list(model.named_modules()) == modules
    assert torch.equal(run(model, probe), wanted)


def test_budgets_hold_and_more_costs_less():
    costs = []
    whole = select(make("llama")[0], sparsity=0.01, dry_run=True).totals()["size_before"]
    for share in (0.35, 0.6, 1.0):
        report = select(make("llama")[0], budget=int(share * whole), dry_run=True)
        assert report.totals()["size_after"] <= share * whole
        costs.append(report.totals()["eps"])
    assert costs[0] > costs[1] > costs[2] == 0
    with pytest.raises(CalibrationError, match=r"a budget of 10, and \d+ at the least"):
        select(make("llama")[0], budget="10B", dry_run=True)


def test_sparsity_counts_submodules_and_takes_the_least_important():
    report = select(make("gpt2")[0], sparsity=0.5, options=LINEAR, dry_run=True)
    taken = [r for r in report.submodules if r.chosen != "keep"]
    assert len(taken) == 2
    best = {r.path: min(v for k, v in r.eps.items() if k != "keep") for r in report.submodules[1:]}
    assert {r.path for r in taken} == set(sorted(best, key=best.get)[:2])
    assert report.submodules[0].note == "a generation cache counts its length by it"


def test_bypasses_share_a_basis_that_is_fitted_to_the_chosen_ones():
    model, _ = make("gpt2")
    report = select(model, sparsity=0.5, options=("bypass",), attention=False, rank=4)
    ((path, one),) = bypasses(model)
    assert report.shared_rank == 4 and one.basis.shape == (4, 32)
    model, _ = make("gpt2")
    report = select(model, sparsity=1.0, options=("bypass",), attention=False, rank=4)
    (_, first), (_, second) = bypasses(model)
    assert first.basis is second.basis and not torch.equal(first.basis, one.basis)
    assert report.shared_bytes == 4 * 32 * 4
    for row in report.submodules:
        assert row.eps["bypass"] < 1 and row.size_after == 4 * (32 * 4 + 32)


def tied(first, second):
    return first.basis is second.basis


def test_a_state_dict_alone_repeats_it():
    model, probe = make("gpt2")
    report = select(model, sparsity=1.0, options=LINEAR)
    assert len(bypasses(model)) == 3 and not list(moe_layers(model))
    plan = plan_from_state_dict(model.state_dict())
    assert plan == json.loads(json.dumps(report.plan()))
    fresh, _ = make("gpt2", seed=9)
    apply_swap_plan(fresh, plan)
    apply_swap_plan(fresh, plan)  # again: nothing to do
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, probe), run(model, probe))
    shared = [m for _, m in bypasses(fresh) if m.group]
    assert tied(*shared)
    outer = nn.Module()
    outer.model = make("gpt2", seed=9)[0]
    wrapped = {f"model.{k}": v for k, v in model.state_dict().items()}
    apply_swap_plan(outer, plan_from_state_dict(wrapped))
    outer.load_state_dict(wrapped)
    assert torch.equal(run(outer.model, probe), run(model, probe))
    assert plan_from_state_dict(outer.state_dict()) == plan_from_state_dict(wrapped)
    twin = copy.deepcopy(model)
    assert tied(*[m for _, m in bypasses(twin) if m.group])


def test_it_is_packed_and_loaded(tmp_path):
    model, probe = make("llama")
    report = select(model, sparsity=1.0)
    kinds = {type(layer) for layer, _ in report.swap.receipts}
    assert LinearBypass in kinds and len(kinds) == 2
    pack(model, tmp_path / "m.bfmoe", angles="fp32")
    fresh, _ = make("llama", seed=9)
    apply_swap_plan(fresh, report.plan())
    load_packed(tmp_path / "m.bfmoe", fresh)
    assert relative(run(fresh, probe), run(model, probe)) < 1e-6


def test_generation_with_a_cache_goes_on_without_some_attention():
    model, probe = make("llama")
    select(model, sparsity=1.0)
    assert isinstance(model.model.layers[1].self_attn, LinearBypass)
    grown = model.generate(probe, max_new_tokens=5, do_sample=False, pad_token_id=0)
    slow = probe
    for _ in range(5):
        step = model(slow, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        slow = torch.cat([slow, step], dim=1)
    assert torch.equal(grown, slow[:, : grown.shape[1]])


class Lit(L.LightningModule):
    """A module that was selected by hand before training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = make("gpt2")[0]

    def training_step(self, batch, batch_idx):
        logits = self.net(batch).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_it_trains_and_its_checkpoint_is_loaded(tmp_path):
    module = Lit()
    report = selected_swap(
        module, ids(), sparsity=0.75, num_experts=4,
        calibration=Calibration(progress=False, forward_fn=lambda m, batch: m.net(batch)),
    )  # fmt: skip
    assert {r.chosen for r in report.submodules} == {"keep", "butterfly+2", "bypass"}
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[TernarySchedule(Plan(start=0, end=0)), AngleWarmup(5.0)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.cat(ids(4)), batch_size=8))
    names = ("attn.basis", "attn.weight", "attn.bias", "latent", "angles", "correction.basis")
    for name in names:
        moved = [n for n in before if n.endswith(name)]
        parameters = dict(module.named_parameters())
        assert moved and all(not torch.equal(before[n], parameters[n]) for n in moved), name
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Lit, tmp_path / "a.ckpt")
    assert torch.equal(run(loaded.net, ids(1)[0]), run(module.net.eval(), ids(1)[0]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "a budget or a sparsity"),
        ({"budget": "1MB", "sparsity": 0.5}, "a budget or a sparsity"),
        ({"sparsity": 1.5}, "sparsity is a share"),
        ({"sparsity": 0.5, "options": ("keep",)}, "not keep alone"),
        ({"sparsity": 0.5, "options": ("merge",)}, "options name some of"),
        ({"sparsity": 0.5, "rank": 40}, "rank lies in 1 to the width 16"),
        ({"sparsity": 0.5, "correction_rank": 17}, "correction_rank lies in 1 to the width 16"),
        ({"sparsity": 0.5, "correction_rank": 0}, "correction_rank lies in 1 to the width 16"),
        ({"sparsity": 0.5, "correction_rank": "8"}, "correction_rank lies in 1 to the width 16"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises((ConfigError, CalibrationError), match=match):
        select(Plain(W123()), **settings)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SwapError, match="must have a feed-forward block"):
        select(nn.Sequential(nn.Linear(16, 16)), sparsity=0.5)


def test_batches_the_model_does_not_take_say_how_to_feed_it():
    with pytest.raises(CalibrationError, match="Pass forward_fn=lambda"):
        selected_swap(Plain(W123()), [{"x": b} for b in ids()], sparsity=0.5, calibration=quiet())


def test_ranks_to_choose_from_are_parts_of_one_fit():
    model, _ = make("llama")
    report = select(
        model, sparsity=1.0, options=("corrected",), correction_rank=[8, 2, 4], attention=False
    )
    for row in report.submodules:
        assert list(row.sizes) == ["keep", "butterfly", "butterfly+2", "butterfly+4", "butterfly+8"]
        errors = [row.eps[f"butterfly+{rank}"] for rank in (2, 4, 8)]
        assert row.eps["butterfly"] > errors[0] > errors[-1]
        assert row.sizes["butterfly+4"] - row.sizes["butterfly"] == 2 * 4 * 64 + 4 * 4
        layer = model.get_submodule(row.path)
        assert row.chosen == f"butterfly+{layer.settings['correction_rank']}"
        assert layer.correction.rank == layer.settings["correction_rank"]
    assert "butterfly+8" in str(report)


def test_a_budget_buys_corrections_where_they_pay():
    options = ("butterfly", "corrected")
    whole = select(make("llama")[0], sparsity=1.0, options=("butterfly",), attention=False)
    size = int(whole.totals()["size_after"])
    extra = 2 * 8 * 64 + 4 * 8
    report = select(
        make("llama")[0], budget=size + extra, options=options, correction_rank=8, attention=False
    )
    assert sorted(r.chosen for r in report.submodules) == ["butterfly", "butterfly+8"]
    assert report.totals()["size_after"] == size + extra
    assert report.totals()["eps"] < whole.totals()["eps"]
    plain = next(r.path for r in report.submodules if r.chosen == "butterfly")
    layers = {layer.placement["path"]: layer for layer, _ in report.swap.receipts}
    assert layers[plain].correction is None


def test_few_tokens_for_a_bypass_are_told():
    with pytest.warns(UserWarning, match=r"fitted to \d+ tokens.*at least 17 tokens, better 128"):
        selected_swap(
            Plain(W123()), [b[:1, :2] for b in ids()], sparsity=1.0, options=LINEAR, rank=4,
            calibration=quiet(),
        )  # fmt: skip


class Data(L.LightningDataModule):
    """A datamodule that builds its data in `setup`."""

    def setup(self, stage):
        self.rows = torch.cat(ids())

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8)


def test_a_datamodule_is_read():
    report = selected_swap(Plain(W123()), Data(), sparsity=1.0, num_experts=2, calibration=quiet())
    assert report.submodules[0].chosen.startswith("butterfly")
    with pytest.raises(CalibrationError, match="a dataloader, an iterable of batches or a datamod"):
        selected_swap(Plain(W123()), None, sparsity=1.0, calibration=quiet())


def test_a_budget_given_to_the_plain_swap_says_where_to_go():
    with pytest.raises(ConfigError, match=r"Call lightning_bfmoe.selected_swap\(model, data, budg"):
        swap_feed_forward(Plain(W123()), budget="40MB")
