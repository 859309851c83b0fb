"""`calibrated_swap` on models of real library classes: nearer, undoable, and all or nothing."""

import json
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bfmoe import Calibration, calibrated_swap, restore, swap_feed_forward
from lightning_bfmoe.calibrate import Recipe
from lightning_bfmoe.errors import CalibrationError, SwapError
from lightning_bfmoe.layers import ButterflyMoE, moe_layers
from lightning_bfmoe.swap import apply_swap_plan
from tests.swap.zoo import W123, ListMoE, Plain, TorchStack, make, relative, run, state

QUIET = Calibration(progress=False)


def ids(count=10, rows=8, length=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (rows, length), generator=generator) for _ in range(count)]


def quiet(**changes):
    return Calibration(progress=False, **changes)


def test_the_door_gives_the_function_however_it_was_reached():
    code = "import lightning_bfmoe.calibrated, lightning_bfmoe as b; b.calibrated_swap.__name__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", "encoder", "sequential", "run", "timm", "fused-gate"]
)
def test_it_is_nearer_than_a_naive_swap_and_undone_exactly(name):
    model, probe = make(name)
    before, modules, wanted = state(model), list(model.named_modules()), run(model, probe)
    report = swap_feed_forward(model, num_experts=4)
    naive = relative(run(model, probe), wanted)
    restore(model, report)
    report = calibrated_swap(model, ids(), num_experts=4, calibration=QUIET)
    assert relative(run(model, probe), wanted) < naive
    assert len(report.blocks) == len(report.calibration.blocks) == len(list(moe_layers(model)))
    assert not any(m._forward_pre_hooks for m in model.modules())
    restore(model, report)
    assert list(model.named_modules()) == modules
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if torch.is_tensor(before[k]))


def test_random_numbers_flags_and_buffers_are_left_alone():
    model, _ = make("gpt2")
    model.train()
    model.transformer.h[0].attn.eval()
    flags = {name: m.training for name, m in model.named_modules() if "mlp" not in name}
    states = torch.get_rng_state(), random.getstate()
    calibrated_swap(model, ids(), calibration=QUIET)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert {n: m.training for n, m in model.named_modules() if n in flags} == flags
    assert model.transformer.h[0].mlp.training


def test_twice_gives_the_same_and_a_plan_repeats_it():
    first, second, fresh = (make("llama")[0] for _ in range(3))
    report = calibrated_swap(first, ids(), calibration=QUIET)
    calibrated_swap(second, ids(), calibration=QUIET)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    apply_swap_plan(fresh, json.loads(json.dumps(report.plan())))
    fresh.load_state_dict(first.state_dict())
    probe = ids(1)[0]
    assert torch.equal(run(fresh, probe), run(first, probe))
    json.dumps(report.to_dict())
    assert "calibration" in report.to_dict()
    assert "held-out tokens" in str(report)
    assert "hadamard" in str(report.calibration) or "identity" in str(report.calibration)


@pytest.mark.parametrize("sequential", [False, True])
def test_groups_do_not_change_what_parallel_finds(sequential):
    models = [make("llama")[0] for _ in range(2)]
    passes = []
    for model, group in zip(models, (1, None), strict=True):
        report = calibrated_swap(
            model, ids(), calibration=quiet(group=group, sequential=sequential)
        )
        passes.append(report.calibration.passes)
    same = all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert same != sequential  # with two layers in one group the second sees a dense first
    assert passes == ([4, 2] if sequential else [3, 2])


def test_sequential_sees_the_swapped_part():
    model, _ = make("llama")
    seen = []

    def forward(model, batch):
        seen.append(isinstance(model.model.layers[0].mlp, ButterflyMoE))
        return model(batch)

    calibrated_swap(model, ids(5), calibration=quiet(group=1, sequential=True, forward_fn=forward))
    assert seen == [False] * 11 + [True] * 10  # one batch finds the order


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("at", [3, 23, 29])
def test_an_interruption_leaves_the_model_untouched(sequential, at):
    model, probe = make("llama")
    before, modules = state(model), list(model.named_modules())
    model.train()
    count = 0

    def forward(model, batch):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt("by hand")
        return model(batch)

    settings = quiet(group=1, sequential=sequential, forward_fn=forward)
    with pytest.raises(KeyboardInterrupt, match="by hand"):
        calibrated_swap(model, ids(), calibration=settings)
    assert list(model.named_modules()) == modules
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_masked_tokens_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Plain(W123())

        def forward(self, input_ids, attention_mask):
            return self.body(input_ids)

    def batches(fill):
        for batch in ids():
            mask = torch.ones_like(batch)
            mask[:, 9:] = 0
            yield {"input_ids": torch.where(mask.bool(), batch, fill), "attention_mask": mask}

    found = []
    for fill in (0, 33):
        torch.manual_seed(0)
        model = Masked()
        report = calibrated_swap(model, batches(fill), calibration=QUIET)
        assert report.calibration.blocks[0].tokens == 8 * 8 * 9
        found.append(model.body.mlp.experts.down.substrate.latent.detach())
    assert torch.equal(*found)


def test_a_mask_of_another_shape_is_refused():
    settings = quiet(mask_fn=lambda batch: torch.ones(3, 5))
    with pytest.raises(CalibrationError, match=r"mask \[3, 5\], input \[8, 12, 16\] of mlp"):
        calibrated_swap(Plain(W123()), ids(), calibration=settings)


def test_sequence_first_activations_take_the_same_mask():
    model = TorchStack()  # (length, batch, width): the mask comes as (batch, length)
    model.embed.register_forward_hook(lambda m, args, out: out.transpose(0, 1))
    settings = quiet(mask_fn=lambda batch: torch.arange(12).expand(8, 12) < 5)
    report = calibrated_swap(model, ids(), calibration=settings)
    assert {block.tokens for block in report.calibration.blocks} == {8 * 8 * 5}


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(torch.stack(ids()).flatten(0, 1), batch_size=8, shuffle=True),
        [(batch, batch) for batch in ids()],
        [{"ids": batch, "text": ["a"] * 8} for batch in ids()],
        iter(ids()),
    ],
    ids=["loader", "pairs", "mapping", "iterator"],
)
def test_what_loaders_yield_is_understood(data):
    model = Plain(W123())
    report = calibrated_swap(model, data, calibration=QUIET)
    assert report.calibration.blocks[0].tokens == 8 * 8 * 12
    assert report.calibration.blocks[0].held_tokens == 2 * 8 * 12


def test_max_batches_ends_an_endless_stream():
    def endless():
        while True:
            yield ids(1)[0]

    report = calibrated_swap(Plain(W123()), endless(), calibration=quiet(max_batches=10))
    assert report.calibration.blocks[0].tokens == 8 * 8 * 12


def test_batches_the_model_does_not_take_say_how_to_feed_it():
    model = Plain(W123())
    before = state(model)
    with pytest.raises(CalibrationError, match=r"a mapping of x: a tensor.*Pass forward_fn=lambda"):
        calibrated_swap(model, [{"x": batch} for batch in ids()], calibration=QUIET)
    assert all(torch.equal(before[k], v) for k, v in state(model).items())
    settings = quiet(forward_fn=lambda model, batch: model(batch["x"]))
    calibrated_swap(model, [{"x": batch} for batch in ids()], calibration=settings)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "must be at least one: got 0 batches"),
        (ids(2), "must be at least one: got 2 batches"),
        ([torch.zeros(1, 1, dtype=torch.int64)] * 5, None),
    ],
)
def test_too_little_data(data, match):
    if match is None:  # four tokens, one of which judges
        match = "at least two tokens, and judged on two others: got 4 and 1"
    with pytest.raises(CalibrationError, match=match):
        calibrated_swap(Plain(W123()), data, calibration=QUIET)


def test_few_tokens_are_used_with_a_warning_that_says_how_many_are_needed():
    data = [batch[:1, :6] for batch in ids()]
    with pytest.warns(UserWarning, match=r"'mlp' was calibrated on 48 tokens.*at least 49"):
        calibrated_swap(Plain(W123(hidden=48)), data, calibration=QUIET)


def test_dead_units_are_told():
    block = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16))
    with torch.no_grad():
        block[0].bias[:3] = -1e3
    with pytest.warns(UserWarning, match=r"3 hidden units of 'mlp'"):
        report = calibrated_swap(Plain(block), ids(), calibration=QUIET)
    assert report.calibration.blocks[0].dead_units == 3
    assert report.calibration.blocks[0].error < 0.5


def test_activations_that_are_not_finite_name_their_layer():
    model, _ = make("llama")
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda m, args, out: out / 0)
    before = list(model.named_modules())
    with pytest.raises(CalibrationError, match=r"in the input of model\.layers\.1\.mlp"):
        calibrated_swap(model, ids(), calibration=QUIET)
    assert list(model.named_modules()) == before


def test_a_block_that_never_runs_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = Plain(W123()), W123()

        def forward(self, batch):
            return self.used(batch)

    with pytest.raises(CalibrationError, match=r"no token at 'idle'"):
        calibrated_swap(Unused(), ids(), calibration=QUIET)
    report = calibrated_swap(Unused(), ids(), exclude="idle", calibration=QUIET)
    assert [block.path for block in report.blocks] == ["used.mlp"]


def test_a_shared_block_is_calibrated_on_all_its_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Embedding(64, 16), W123()
            self.second = self.first

        def forward(self, batch):
            x = self.embed(batch)
            return self.second(x + self.first(x))

    model = Shared()
    report = calibrated_swap(model, ids(), calibration=QUIET)
    assert model.first is model.second
    assert report.calibration.blocks[0].tokens == 2 * 8 * 8 * 12


def test_blocks_with_their_own_router_are_told_and_not_calibrated():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.sparse = Plain(W123()), ListMoE()

        def forward(self, batch):
            x = self.dense.embed(batch)
            return self.sparse(x + self.dense.mlp(x))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*independent experts do not fit.*")
        with pytest.warns(UserWarning, match="1 expert blocks with a router of their own"):
            report = calibrated_swap(Both(), ids(), calibration=QUIET)
    assert {block.path: block.own_router for block in report.blocks} == {
        "dense.mlp": False,
        "sparse.experts": True,
    }
    assert [block.path for block in report.calibration.blocks] == ["dense.mlp"]


def test_routers_start_from_clusters_when_asked():
    models = [Plain(W123()) for _ in range(2)]
    for model, router in zip(models, ("random", "clusters"), strict=True):
        calibrated_swap(model, ids(), num_experts=4, calibration=quiet(router=router))
    random_start, clustered = (m.mlp.router.weight.detach() for m in models)
    assert float(random_start.std()) == pytest.approx(0.02, rel=0.3)
    assert float(clustered.std()) > 0.05


def test_frozen_blocks_stay_frozen_and_double_stays_double():
    model = Plain(W123()).double()
    model.mlp.requires_grad_(False)
    calibrated_swap(model, ids(), calibration=QUIET)
    assert not any(p.requires_grad for p in model.mlp.parameters())
    assert model(ids(1)[0]).dtype == torch.float64


def test_a_bfloat16_model_is_calibrated():
    model = Plain(W123()).bfloat16().eval()
    wanted = model(ids(1)[0])
    report = calibrated_swap(model, ids(), calibration=QUIET)
    assert report.calibration.blocks[0].error < 0.5
    assert model(ids(1)[0]).dtype == torch.bfloat16
    assert relative(model(ids(1)[0]), wanted) < 0.7


def test_the_recipe_can_be_cut_down():
    settings = quiet(recipe=Recipe(bases=("identity",), sweeps=0, refit=False, noise=0.0))
    report = calibrated_swap(Plain(W123()), ids(), calibration=settings)
    block = report.calibration.blocks[0]
    assert block.ridge is None
    assert {choice.basis for choice in block.choices.values()} == {"identity"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"router": "best"}, "router must be"),
        ({"group": 0}, "group must be at least 1"),
        ({"recipe": Recipe(bases=("fourier",))}, "recipe.bases names some of"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"max_batches": 1}, "at least two batches"),
    ],
)
def test_bad_settings_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        calibrated_swap(Plain(W123()), ids(), calibration=quiet(**change))


def test_a_model_without_blocks_is_refused_as_by_the_plain_swap():
    with pytest.raises(SwapError, match="."):
        calibrated_swap(nn.Sequential(nn.Linear(4, 4)), ids(), calibration=QUIET)
