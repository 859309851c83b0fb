"""What goes into a packed file comes out of it, bit for bit."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_bfmoe.deploy import inspect_packed, load_packed, pack
from lightning_bfmoe.kernels import use_kernel
from lightning_bfmoe.layers import (
    ButterflyExperts,
    ButterflyMoE,
    PackedSubstrate,
    Substrate,
    moe_layers,
)

SETTINGS = [
    {},
    {"gains": True, "gated": True, "activation": "silu"},
    {"bias": False, "granularity": "tensor", "scale": "absmean"},
    {"down": "dense", "activation": "identity", "stages": 2},
    {"top_k": 3, "router_noise": 0.1, "switch_weight": 0.01, "dropout": 0.2},
]


def tensors_of(model):
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("bits", ["1.6", "2"])
@pytest.mark.parametrize("angles", ["fp16", "fp32", "int8", "int4"])
def test_a_dense_model_becomes_the_packed_one(
    settings, bits, angles, dense, swapped, as_stored, ids, file, rng_untouched
):
    state = torch.get_rng_state()
    model = swapped(**settings)
    torch.set_rng_state(state)
    pack(model, file, bits=bits, angles=angles)
    fresh = dense()
    torch.set_rng_state(state)
    loaded = load_packed(file, fresh)
    assert loaded is fresh
    assert not loaded.training

    with torch.no_grad():
        assert torch.equal(loaded(ids), as_stored(model, angles)(ids))
    stored = load_file(file)
    found = tensors_of(loaded)
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    for (_, before), (_, after) in zip(moe_layers(model), moe_layers(loaded), strict=True):
        for linear, packed in zip(
            before.experts.linears().values(), after.experts.linears().values(), strict=True
        ):
            for one, other in zip(
                linear.substrate.ternary(), packed.substrate.ternary(), strict=True
            ):
                assert torch.equal(one, other)


def test_the_rest_of_the_model_is_stored_as_it_is(dense, swapped, file):
    model = swapped().to(torch.bfloat16)
    model.embed.weight.data[0, 0] = torch.tensor(1e-40)  # survives in no arithmetic
    pack(model, file)
    loaded = load_packed(file, dense())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and ".fc1." not in name:
            other = tensors_of(loaded)[name]
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)
            assert type(other) is type(tensor)
    assert loaded.embed.weight.dtype == torch.bfloat16
    assert loaded.blocks[0].fc1.router.weight.dtype == torch.float32
    assert torch.equal(loaded.scratch, model.scratch.float())


def test_ties_and_shared_blocks_are_stored_once_and_stay_shared(dense, swapped, file):
    report = pack(swapped(), file)
    stored = load_file(file)
    assert "head.weight" not in stored
    assert not any(name.startswith("blocks.2") for name in stored)
    assert report.aliases["head.weight"] == "embed.weight"
    loaded = load_packed(file, dense())
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.blocks[2] is loaded.blocks[1]
    assert loaded.blocks[2].fc1 is loaded.blocks[1].fc1


def test_a_tie_in_the_model_that_the_file_does_not_have_is_undone(dense, swapped, file):
    model = swapped()
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    pack(model, file)
    loaded = load_packed(file, dense())
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert torch.equal(loaded.embed.weight, model.embed.weight)


def test_a_tie_in_the_file_that_the_model_does_not_have_is_made(dense, swapped, file):
    pack(swapped(), file)
    fresh = dense()
    fresh.head.weight = nn.Parameter(fresh.head.weight.detach() + 1)
    loaded = load_packed(file, fresh)
    assert loaded.head.weight is loaded.embed.weight


def test_a_substrate_shared_by_two_layers_is_stored_once(file):
    def build():
        model = nn.Sequential(ButterflyMoE(8, 16, 4), ButterflyMoE(8, 16, 4, seed=1))
        model[1].experts.up.substrate = model[0].experts.up.substrate
        model[1].experts.down.bias = model[0].experts.down.bias
        return model

    model = build()
    report = pack(model, file)
    assert report.aliases == {
        f"1.experts.{name}": f"0.experts.{name}"
        for name in ("up.substrate.packed", "up.substrate.alpha", "down.bias")
    }
    loaded = load_packed(file, build())
    one, other = (layer.experts.up.substrate for layer in loaded)
    assert one.packed is other.packed
    x = torch.randn(5, 8)
    assert torch.equal(load_packed(file, build())(x), loaded(x))


def test_a_swapped_model_keeps_its_layer_objects(swapped, as_stored, ids, file):
    model, fresh = swapped(), swapped(angle_std=0.1)
    pack(model, file)
    layers = [layer for _, layer in moe_layers(fresh)]
    loaded = load_packed(file, fresh)
    assert [layer for _, layer in moe_layers(loaded)] == layers
    with torch.no_grad():
        assert torch.equal(loaded(ids), as_stored(model)(ids))


@pytest.mark.parametrize("build", [ButterflyMoE, ButterflyExperts])
def test_a_layer_built_by_hand_packs_without_placement(build, file):
    model = nn.Sequential(nn.Identity(), build(6, 10, 3))
    pack(model, file)
    assert inspect_packed(file).layers[0].record.placement is None
    fresh = nn.Sequential(nn.Identity(), build(6, 10, 3, seed=9))
    loaded = load_packed(file, fresh)
    substrates = [m for m in loaded.modules() if isinstance(m, Substrate | PackedSubstrate)]
    assert {type(m) for m in substrates} == {PackedSubstrate}


def test_a_layer_alone(file, as_stored):
    layer = ButterflyMoE(7, 9, 4, gains=True)
    pack(layer, file)
    x = torch.randn(2, 3, 7)
    loaded = load_packed(file, ButterflyMoE(7, 9, 4, gains=True, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), as_stored(layer)(x))
        with use_kernel("linear", "parts"), use_kernel("ternary", "dense"):  # the same sums
            assert torch.equal(loaded(x), as_stored(layer)(x))


def test_a_packed_layer_trains_nothing_and_carries_no_latent_weight(dense, swapped, file):
    pack(swapped(), file)
    loaded = load_packed(file, dense())
    for _, layer in moe_layers(loaded):
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not any("latent" in name for name in layer.state_dict())
        assert layer.blend == 1.0
    assert loaded.embed.weight.requires_grad


def test_a_packed_model_copies_pickles_moves_and_saves(dense, swapped, ids, file, tmp_path):
    pack(swapped(gains=True), file)
    loaded = load_packed(file, dense())
    with torch.no_grad():
        expected = loaded(ids)
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(other(ids), expected)
            assert other.head.weight is other.embed.weight
        torch.save(loaded.state_dict(), tmp_path / "state.pt")
        again = load_packed(file, dense())
        for tensor in tensors_of(again).values():
            tensor.data = torch.zeros_like(tensor)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(again(ids), expected)
        assert torch.equal(loaded.to("cpu").double().float()(ids), expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
    ],
)
def test_a_cast_keeps_the_stored_numbers_of_packed_layers(dtype, dense, swapped, file):
    pack(swapped(gains=True), file)
    loaded = load_packed(file, dense())
    before = [copy.deepcopy(layer).state_dict() for _, layer in moe_layers(loaded)]
    loaded.to(dtype)
    for state, (_, layer) in zip(before, moe_layers(loaded), strict=True):
        after = layer.state_dict()
        for name in state:
            if isinstance(state[name], torch.Tensor):
                assert torch.equal(after[name].double(), state[name].double()), name


def test_packing_a_packed_model_again_writes_the_same_bytes(dense, swapped, file, tmp_path):
    pack(swapped(gains=True), file)
    pack(load_packed(file, dense()), tmp_path / "again.bfmoe")
    assert (tmp_path / "again.bfmoe").read_bytes() == file.read_bytes()


def test_packing_does_not_touch_the_model(swapped, file):
    model = swapped(gains=True).train()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    modules = dict(model.named_modules())
    pack(model, file)
    assert dict(model.named_modules()) == modules
    assert model.training
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, before[name])


def test_finalize_packs_the_ternary_matrix_and_leaves_lambda_alone(
    dense, swapped, as_stored, ids, file
):
    model = swapped()
    for _, layer in moe_layers(model):
        layer.set_blend(0.25)
    pack(model, file, finalize=True)
    assert {layer.blend for _, layer in moe_layers(model)} == {0.25}
    with torch.no_grad():
        assert torch.equal(load_packed(file, dense())(ids), as_stored(model)(ids))


def test_packed_from_an_inner_model_or_an_outer_one(dense, swapped, ids, file):
    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    inner = swapped()
    pack(Outer(inner), file)
    loaded = load_packed(file, Outer(dense())).model
    pack(loaded, file, overwrite=True)
    with torch.no_grad():
        assert torch.equal(load_packed(file, dense())(ids), loaded(ids))


def test_a_model_on_meta_is_filled(dense, swapped, ids, file):
    model = swapped()
    pack(model, file)
    with torch.device("meta"):
        fresh = dense()
    fresh.scratch = torch.ones(2)
    loaded = load_packed(file, fresh)
    assert not any(
        tensor.is_meta for tensor in loaded.state_dict().values() if hasattr(tensor, "is_meta")
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids), load_packed(file, dense())(ids))


def test_extra_state_of_foreign_modules_travels_as_json(file):
    class Counted(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen, "names": ["ä", None]}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = nn.Sequential(Counted(6, 6), ButterflyMoE(6, 8, 2))
    model[0].seen = 7
    pack(model, file)
    loaded = load_packed(file, nn.Sequential(Counted(6, 6), ButterflyMoE(6, 8, 2)))
    assert loaded[0].seen == 7


def test_an_activation_with_parameters_needs_a_swapped_model(file):
    def build(slope):
        return nn.Sequential(ButterflyMoE(6, 8, 2, activation=nn.PReLU(init=slope)))

    model = build(0.4)
    pack(model, file)
    loaded = load_packed(file, build(0.1))
    assert loaded[0].experts.activation.function.weight.item() == pytest.approx(0.4)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(load_packed(file, build(0.2))(x), loaded(x))


@pytest.mark.gpu
def test_a_model_packed_on_a_gpu_loads_there_and_on_the_cpu(dense, swapped, ids, file, tmp_path):
    model = swapped(gains=True)
    pack(model, file)
    pack(model.to("cuda"), tmp_path / "gpu.bfmoe")
    # A GPU sums a row's scale in another order; a trit exactly at a threshold could differ.
    files = [tensors_of(load_packed(f, dense())) for f in (file, tmp_path / "gpu.bfmoe")]
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-5, atol=1e-7)
    loaded = load_packed(file, dense(), device="cuda")
    assert {tensor.device.type for tensor in tensors_of(loaded).values()} == {"cuda"}
    there = load_packed(file, dense().to("cuda"))
    with torch.no_grad():
        assert torch.equal(loaded(ids.cuda()), there(ids.cuda()))
        torch.testing.assert_close(loaded(ids.cuda()).cpu(), load_packed(file, dense())(ids))
