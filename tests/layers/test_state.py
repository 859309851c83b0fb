"""What must survive: state_dict, deepcopy, pickle, casts, compile, checkpointing; own RNG."""

import copy
import pickle
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from lightning_bfmoe.errors import CheckpointError, ConfigError, ShapeError
from lightning_bfmoe.kernels import use_kernel
from lightning_bfmoe.layers import (
    ButterflyExperts,
    ButterflyMoE,
    PackedSubstrate,
    moe_layers,
    parameter_roles,
)
from lightning_bfmoe.layers.state import decode_extra_state, encode_extra_state


def build(**settings):
    return ButterflyMoE(**{"d_model": 12, "d_ff": 20, "num_experts": 4, "seed": 1, **settings})


def test_state_dict_round_trip_is_exact_and_carries_lambda(tmp_path):
    layer, other = build(gains=True), build(gains=True, seed=9, angle_std=0.1)
    layer.set_blend(0.25)
    torch.save(layer.state_dict(), tmp_path / "s.pt")
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    x = torch.randn(5, 12)
    assert other.blend == 0.25
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(clone):
    layer = build()
    x = torch.randn(5, 12)
    before = layer(x)  # also fills last_routing, which holds no graph afterwards
    twin = clone(layer)
    assert torch.equal(twin(x), before)
    twin.set_blend(0.0)
    with torch.no_grad():
        twin.router.weight.zero_()
    assert layer.blend == 1.0 and torch.equal(layer(x), before)


def test_a_state_of_other_settings_is_refused():
    state = build(scale="absmean").state_dict()
    with pytest.raises(CheckpointError, match="scale: layer 'lstsq', checkpoint 'absmean'"):
        build().load_state_dict(state)
    state = build().state_dict()
    newer = {**decode_extra_state(state["_extra_state"]), "version": 99}
    state["_extra_state"] = encode_extra_state(newer)
    with pytest.raises(CheckpointError, match="got version 99 of ButterflyMoE"):
        build().load_state_dict(state)


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)]
)
def test_narrow_casts_keep_our_parameters_float32(cast):
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), build())
    before = copy.deepcopy(model[1].state_dict())
    cast(model)
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in model[1].state_dict().items():
        if not name.endswith("_extra_state"):
            assert torch.equal(value, before[name]) and value.dtype == torch.float32
    assert model(torch.randn(3, 12, dtype=model[0].weight.dtype)).dtype == model[0].weight.dtype
    model.double()
    assert model[1].router.weight.dtype == torch.float64


def test_a_state_dict_holds_nothing_but_tensors(tmp_path):
    layer = build(activation=torch.nn.PReLU())
    state = {name: value.cpu().clone() for name, value in layer.state_dict().items()}
    save_file(state, tmp_path / "s.safetensors")
    twin = build(activation=torch.nn.PReLU(), seed=4)
    twin.load_state_dict(load_file(tmp_path / "s.safetensors"))
    x = torch.randn(5, 12)
    assert torch.equal(twin(x), layer(x))
    assert decode_extra_state(torch.tensor([7], dtype=torch.uint8)) is None
    assert decode_extra_state("placeholder") is None


def test_meta_and_back():
    layer = build().to("meta")
    assert all(p.is_meta for p in layer.parameters()) and layer.experts.up.substrate.blend.is_meta
    assert not any(p.is_meta for p in layer.to_empty(device="cpu").parameters())


def test_autocast_gives_the_inputs_dtype_back():
    layer = build()
    x = torch.randn(6, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert (y - layer(x)).norm() < 0.03 * y.norm()


def test_compiled_layer_equals_eager_without_graph_breaks_or_recompiles():
    code = """
        import torch
        from lightning_bfmoe.layers import ButterflyMoE
        layer = ButterflyMoE(12, 20, num_experts=4, seed=1, switch_weight=0.0)
        graphs = []
        def count(graph, _):
            graphs.append(graph)
            return graph.forward
        compiled = torch.compile(layer, fullgraph=True, backend=count)
        for blend in (0.0, 0.3, 0.7, 1.0):
            layer.set_blend(blend)
            x = torch.randn(40, 12, requires_grad=True)
            a, b = compiled(x), layer(x)
            torch.testing.assert_close(a, b)
            ga = torch.autograd.grad(a.square().sum(), [x, *layer.parameters()])
            gb = torch.autograd.grad(b.square().sum(), [x, *layer.parameters()])
            torch.testing.assert_close(ga, gb)
        print("graphs", len(graphs))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["graphs", "1"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    layer = build(switch_weight=0.1, z_weight=0.1)
    x = torch.randn(30, 12, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    if reentrant:
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        again = [p.grad for p in layer.parameters()]
    else:
        y = checkpoint(layer, x, use_reentrant=False)
        again = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_building_moves_no_global_generator_and_is_reproducible():
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    a, b = build(down="dense", gated=True), build(down="dense", gated=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(build(seed=2).router.weight, a.router.weight)


def test_the_weight_follows_writes_that_leave_no_trace():
    layer = build().eval()
    x = torch.randn(4, 12)
    with torch.no_grad():
        first = layer(x)
        layer.experts.up.substrate.latent.data.mul_(-1)  # an EMA teacher writes like this
        assert torch.equal(layer(x), copy.deepcopy(layer)(x)) and not torch.equal(layer(x), first)
    layer.train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer(x)
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_an_empty_batch_reaches_every_parameter():
    layer = build(gated=True)
    y = layer(torch.randn(0, 12))
    assert y.shape == (0, 12)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_a_dense_state_is_told_apart():
    model = torch.nn.ModuleDict({"mlp": build()})
    with pytest.raises(RuntimeError, match="mlp is a ButterflyMoE layer, but the state was saved"):
        model.load_state_dict({"mlp.weight": torch.zeros(2)})


def test_packed_substrate_is_exactly_the_ternary_one():
    layer, x = build(), torch.randn(6, 12)
    with torch.inference_mode():
        before = layer(x)
    for bits in ("1.6", "2"):
        twin = copy.deepcopy(layer)
        for linear in twin.experts.linears().values():
            linear.substrate = PackedSubstrate.from_substrate(linear.substrate, bits)
            linear.rotate_in.freeze(torch.float32), linear.rotate_out.freeze(torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), before)
            with use_kernel("linear", "parts"), use_kernel("ternary", "dense"):  # the same sums
                assert torch.equal(twin(x), before)
        assert "experts.up.substrate.latent" not in twin.state_dict()
        twin(x).sum().backward()  # what the inference pass cached must serve here too
        assert twin.router.weight.grad.abs().max() > 0
        assert twin.half().experts.up.substrate.alpha.dtype == torch.float32
        with pytest.raises(
            ConfigError, match=r"packed substrate is ternary \(lambda = 1\): got 0.5"
        ):
            twin.set_blend(0.5)


def test_frozen_float16_angles_are_the_rounded_ones():
    layer = build()
    with torch.no_grad():
        layer.experts.up.rotate_in.angles.add_(
            7.0
        )  # beyond pi: wrapped, or float16 loses precision
    angles = layer.experts.up.rotate_in.angles.detach().clone()
    frozen = layer.experts.up.rotate_in.freeze(torch.float16).angles
    assert frozen.dtype == torch.float16 and frozen.abs().max() <= 3.1416
    assert (torch.exp(1j * frozen.float()) - torch.exp(1j * angles)).abs().max() < 2e-3
    with pytest.raises(ConfigError, match="float16, bfloat16 or float32: got torch.int8"):
        layer.experts.up.rotate_out.freeze(torch.int8)


def test_collecting_layers_and_roles():
    model = torch.nn.ModuleDict(
        {"a": build(gains=True), "b": ButterflyExperts(8, 8, 2), "c": torch.nn.Linear(2, 2)}
    )
    model["shared"] = model["a"]
    assert [name for name, _ in moe_layers(model)] == ["a", "b"]
    roles = parameter_roles(model)
    assert roles["a.experts.up.rotate_in.angles"] == "angle"
    assert roles["a.experts.down.substrate.latent"] == "latent"
    assert roles["a.experts.up.gain_in"] == "gain" and roles["a.router.weight"] == "router"
    assert roles["b.up.bias"] == "bias" and not any(name.startswith("c.") for name in roles)
    assert set(roles) == {n for n, _ in model.named_parameters() if not n.startswith("c.")}
    dense = parameter_roles(ButterflyMoE(8, 8, 2, down="dense"))
    assert dense["experts.down.weight"] == "projection"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 1}, r"d_model must be an integer >= 2, .*got d_model=1"),
        ({"d_ff": 0}, r"d_ff must be an integer >= 2, .*got d_ff=0"),
        (
            {"num_experts": 2, "top_k": 3},
            "top_k must be at most num_experts: got top_k=3, num_experts=2",
        ),
        ({"activation": "gellu"}, r"an activation is one of .*got 'gellu'"),
        ({"angle_std": float("nan")}, "angle_std must be a finite number"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\): got dropout=1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_bad_input_and_blend():
    with pytest.raises(ShapeError, match=r"d_model=12: got \(3, 13\)"):
        build()(torch.randn(3, 13))
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]: got 1.5"):
        build().set_blend(1.5)
