"""What a swap must not disturb: random numbers, flags, sharing, hooks; and all or nothing."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError, SwapError
from lightning_bfmoe.layers import ButterflyMoE, moe_layers, set_blend
from lightning_bfmoe.swap import (
    SwapReport,
    apply_swap_plan,
    find_feed_forward,
    restore,
    swap_feed_forward,
)
from tests.swap.zoo import (
    W123,
    FusedGate,
    Plain,
    TimmMlp,
    TorchStack,
    Weird,
    make,
    relative,
    run,
    state,
)


def mlp(d=16, hidden=40):
    return nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.ModuleList([first]), nn.ModuleDict({"x": second})

    def forward(self, x):
        return self.second["x"](self.first[0](x))


def test_no_global_random_number_is_drawn():
    model = Plain(Weird()).train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = swap_feed_forward(model)
    restore(model, report)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_dry_run_changes_nothing_and_tells_the_same_sizes():
    model, ids = make("gpt2")
    before, modules, wanted = state(model), list(model.named_modules()), run(model, ids)
    dry = swap_feed_forward(model, num_experts=4, gains=True, dry_run=True)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(run(model, ids), wanted)
    real = swap_feed_forward(model, num_experts=4, gains=True)
    assert dry.totals() == real.totals()
    assert all(block.relative_error is None for block in dry.blocks)
    counted = sum(p.numel() for _, layer in moe_layers(model) for p in layer.parameters())
    assert real.totals()["parameters_after"] == counted


def test_a_shared_block_stays_shared():
    block = mlp()
    model = Two(block, block)
    report = swap_feed_forward(model, angle_std=0.0)
    assert model.first[0] is model.second["x"]
    assert isinstance(model.first[0], ButterflyMoE)
    assert [b.places for b in report.blocks] == [2]
    assert report.placements[0]["aliases"] == ["second.x"]
    restore(model, report)
    assert model.first[0] is model.second["x"] is block


def test_a_block_of_a_shared_layer_is_swapped_once():
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True)
    model = Two(layer, layer).eval()
    x = torch.randn(2, 5, 16)
    wanted = model(x)
    report = swap_feed_forward(model, angle_std=0.0)
    set_blend(model, 0.0)
    assert len(report) == 1
    assert report.placements[0]["aliases"] == []
    assert relative(model(x), wanted) < 1e-5
    restore(model, report)
    assert model.first[0] is layer
    assert torch.equal(model(x), wanted)


def test_weights_tied_to_something_else_are_refused():
    model = Two(mlp(), mlp())
    model.second["x"][0].weight = model.first[0][0].weight
    with pytest.raises(
        SwapError, match=r"weights are shared with 'second\.x\.0', a swap would untie"
    ):
        swap_feed_forward(model)


def test_flags_device_and_dtype_are_kept():
    model = Two(mlp(), mlp()).to(torch.bfloat16)
    model.train()
    model.first[0].eval()
    model.first[0].requires_grad_(False)
    swap_feed_forward(model)
    first, second = model.first[0], model.second["x"]
    assert not any(m.training for m in first.modules())
    assert all(m.training for m in second.modules())
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("block", [Weird, W123, TimmMlp, FusedGate])
def test_other_dtypes_are_recognised_and_preserved(block, dtype, limit):
    model = Plain(block()).to(dtype).eval()
    ids = torch.arange(12).reshape(2, 6)
    wanted = run(model, ids)
    swap_feed_forward(model, angle_std=0.0)
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) < limit


def test_experts_of_different_layers_start_apart_and_the_seed_decides():
    def angles(seed):
        torch.manual_seed(0)
        model = Two(mlp(), mlp())
        swap_feed_forward(model, seed=seed)
        return [layer.experts.up.rotate_in.angles for _, layer in moe_layers(model)]

    first, second = angles(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, angles(0)[0])
    assert not torch.equal(first, angles(7)[0])


def test_a_second_swap_does_nothing():
    model = Two(mlp(), TimmMlp())
    swap_feed_forward(model, include="first.0")
    layer = model.first[0]
    report = swap_feed_forward(model)
    assert [b.path for b in report.blocks] == ["second.x"]
    again = swap_feed_forward(model)
    assert len(again) == 0
    assert model.first[0] is layer
    assert len(swap_feed_forward(model, include=["first.*", "second.x"])) == 0
    restore(model, again)
    assert isinstance(model.second["x"], ButterflyMoE)
    restore(model, report)
    assert isinstance(model.second["x"], TimmMlp)


def test_all_or_nothing(monkeypatch):
    model = Two(mlp(), W123())
    before = list(model.named_modules())
    load = ButterflyMoE.load_dense_

    def fail_when_gated(self, up, down, gate=None, **biases):
        if gate is not None:
            raise ConfigError("a test must fail", got="gate", fix="On purpose.")
        return load(self, up, down, gate, **biases)

    monkeypatch.setattr(ButterflyMoE, "load_dense_", fail_when_gated)
    with pytest.raises(SwapError, match=r"nothing was changed: got block 'second\.x' .*On purpose"):
        swap_feed_forward(model)
    assert list(model.named_modules()) == before


def test_installing_is_undone_when_a_later_slot_fails(monkeypatch):
    model = Two(mlp(), W123())
    before = list(model.named_modules())
    from lightning_bfmoe.swap import swap as module

    real = module.apply_replacement

    def fail_second(model, entry, layer):
        if entry["path"] == "second.x":
            raise SwapError("a test must fail", got="second.x")
        return real(model, entry, layer)

    monkeypatch.setattr(module, "apply_replacement", fail_second)
    with pytest.raises(SwapError, match="a test must fail"):
        swap_feed_forward(model)
    assert list(model.named_modules()) == before


def test_hooks_and_state_of_the_blocks_are_not_touched_while_searching():
    class Counting(TimmMlp):
        def __init__(self):
            super().__init__()
            self.calls, self.last = 0, None
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            self.last = super().forward(x)
            return self.last

    model, fired = Plain(Counting()), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    assert [c.status for c in find_feed_forward(model)] == ["ready"]
    assert fired == []
    assert (model.mlp.calls, model.mlp.last, float(model.mlp.seen)) == (0, None, 0.0)
    assert model.mlp.training
    assert len(model.mlp._forward_hooks) == 1


def test_scratch_draws_new_weights():
    model, ids = make("llama")
    wanted = run(model, ids)
    swap_feed_forward(model, ButterflyMoEConfig(init="scratch"))
    layer = next(layer for _, layer in moe_layers(model))
    assert layer.settings["angle_std"] == 0.5
    set_blend(model, 0.0)
    assert relative(run(model, ids), wanted) > 0.05


def test_the_config_may_change_activation_and_dropout():
    model = Plain(TimmMlp())
    report = swap_feed_forward(
        model, ButterflyMoEConfig(num_experts=3), activation="relu", dropout=0.5
    )
    assert (report.blocks[0].activation, report.blocks[0].num_experts) == ("relu", 3)
    assert model.mlp.settings["dropout"] == model.mlp.experts.dropout.p == 0.5


def test_the_paper_preset_swaps():
    model, ids = make("gpt2")
    report = swap_feed_forward(model, ButterflyMoEConfig.preset("paper"))
    assert run(model, ids).isfinite().all()
    counted = sum(p.numel() for _, layer in moe_layers(model) for p in layer.parameters())
    assert report.totals()["parameters_after"] == counted


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_the_inference_fast_path_is_off_and_comes_back():
    model = TorchStack(batch_first=True, dropout=0.0).eval()
    x, pad = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
    pad[1, 4:] = True
    with torch.no_grad():
        fast = model.encoder(x, src_key_padding_mask=pad)
        report = swap_feed_forward(model, angle_std=0.0)
        set_blend(model, 0.0)
        assert model.encoder.use_nested_tensor is False
        slow = model.encoder(x, src_key_padding_mask=pad)
        assert relative(slow[~pad], fast[~pad]) < 1e-5
        restore(model, report)
        assert model.encoder.use_nested_tensor is True
        assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == [1, 1]
        assert torch.equal(model.encoder(x, src_key_padding_mask=pad), fast)


def test_default_device_and_dtype_of_the_caller_do_not_matter():
    model = Two(mlp(), TimmMlp())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            report = swap_feed_forward(model, gains=True)
            fresh = Two(mlp(), TimmMlp())
            apply_swap_plan(fresh.to_empty(device="cpu"), report.plan())
    finally:
        torch.set_default_dtype(torch.float32)
    for swapped in (model, fresh):
        assert {(p.device.type, p.dtype) for p in swapped.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m: swap_feed_forward(m, top_k=9, num_experts=4),
            ConfigError,
            "top_k must be at most",
        ),
        (lambda m: swap_feed_forward(m, experts=4), ConfigError, "only known fields"),
        (
            lambda m: swap_feed_forward(m, fit_steps=-1),
            SwapError,
            "fit_steps must be an integer >= 0",
        ),
    ],
)
def test_bad_settings(call, error, match):
    with pytest.raises(error, match=match):
        call(Plain(mlp()))


def _meta(model):
    return model.to("meta")


def _nan(model):
    with torch.no_grad():
        model.mlp[0].weight[3, 2] = float("nan")
    return model


def _inf(model):
    with torch.no_grad():
        model.mlp[2].bias[0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_meta, r"'mlp': 0\.weight is on the meta device\. Materialise .*exclude='mlp'"),
        (_nan, r"'mlp': 0\.weight holds 1 NaN or infinite of 640 numbers"),
        (_inf, r"'mlp': 2\.bias holds 1 NaN or infinite of 16 numbers"),
    ],
)
def test_unreadable_weights(spoil, match):
    model = spoil(Plain(mlp()))
    with pytest.raises(SwapError, match=match):
        swap_feed_forward(model)


def test_nan_outside_a_feed_forward_block_is_not_our_business():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.o((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ x)

    model = Two(Attention(), mlp())
    with torch.no_grad():
        model.first[0].q.weight.fill_(float("nan"))
    assert [b.path for b in swap_feed_forward(model).blocks] == ["second.x"]


def test_dtensor_weights_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = Plain(mlp())
        for leaf in (model.mlp[0], model.mlp[2]):
            leaf.weight = nn.Parameter(distribute_tensor(leaf.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(SwapError, match=r"0\.weight is a DTensor\. Swap before sharding"):
            swap_feed_forward(model)
    finally:
        dist.destroy_process_group()


def test_layers_too_narrow_for_a_butterfly_are_not_found():
    model = Plain(nn.Sequential(nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 16)))
    with pytest.raises(SwapError, match="must have a feed-forward block"):
        swap_feed_forward(model)


def test_a_part_of_a_swap_is_restored_by_a_report_of_its_own():
    def block():
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    model = nn.Sequential(block(), block())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = swap_feed_forward(model)
    restore(model, SwapReport(blocks=report.blocks, receipts=report.receipts[:1]))
    with pytest.raises(SwapError, match="each receipt of a report restores once"):
        restore(model, report)
    report.receipts[:] = [receipt for receipt in report.receipts if receipt[1].before]
    restore(model, report)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
