"""Angles and gains as codes: exact, refused when damaged; files of version 1 are still read."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_bfmoe.deploy import inspect_packed, load_packed, pack, read_packed
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.layers import ButterflyMoE, CodedNumbers, CodedRotation
from tests.deploy.test_damaged_files import header_length, resealed, state

OLD = Path(__file__).parent / "data" / "version_1.bfmoe"
CODED = {"int8": {"angles": "int8", "gains": "int8"}, "int4": {"angles": "int4", "gains": "int8"}}


def build():
    """Odd widths, so that rows of 4-bit codes end with half a byte."""
    model = nn.Sequential(nn.Linear(3, 6), ButterflyMoE(6, 10, 2, gains=True), nn.Linear(6, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gain" in name:
                parameter.normal_(1.0, 0.1)
    return model


@pytest.fixture(params=list(CODED))
def coded(request, file):
    """A file with codes and a recorded example, and the settings that wrote it."""
    pack(build(), file, **CODED[request.param], rest="bf16", example=torch.randn(4, 3).bfloat16())
    return file


def settings_of(file):
    (layer,) = read_packed(file).header.layers
    return layer.angles, layer.gains


@pytest.mark.parametrize("rest", ["keep", "bf16"])
@pytest.mark.parametrize("kind", list(CODED))
def test_pack_load_pack_writes_the_same_bytes(kind, rest, file, tmp_path):
    example = torch.randn(4, 3).to(torch.bfloat16 if rest == "bf16" else torch.float32)
    pack(build(), file, **CODED[kind], rest=rest, example=example)
    loaded = load_packed(file, build())
    for number, others in enumerate(({}, CODED[kind])):  # codes are kept, asked for or not
        again = tmp_path / f"again{number}.bfmoe"
        pack(loaded, again, rest=rest, example=example, **others)
        assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", list(CODED))
@pytest.mark.parametrize("gated", [False, True])
def test_the_loaded_model_computes_what_its_numbers_say(kind, gated, swapped, as_stored, ids, file):
    settings = {"gains": True, "gated": gated, "activation": "silu"}
    model = swapped(**settings)
    pack(model, file, **CODED[kind])
    loaded = load_packed(file, swapped(**settings))
    with torch.no_grad():
        assert torch.equal(loaded(ids), as_stored(model, **CODED[kind])(ids))
    rotations = [m for m in loaded.modules() if isinstance(m, CodedRotation)]
    assert len(rotations) == (12 if gated else 8)
    assert not any(p.requires_grad for m in rotations for p in m.parameters())
    layer = loaded.blocks[0].fc1
    assert isinstance(layer.experts.up.gain_in, CodedNumbers)
    packed = layer.experts.up.expert_weight(1)
    trained = as_stored(model, **CODED[kind]).blocks[0].fc1.experts.up.expert_weight(1)
    assert torch.equal(packed, trained)


def test_codes_survive_casts_state_dicts_and_other_encodings(coded, tmp_path):
    loaded = load_packed(coded, build()).float()
    x = torch.randn(5, 3)
    with torch.no_grad():
        before = loaded(x)
        other = load_packed(coded, build()).half().float()
        other.load_state_dict(loaded.state_dict())
        assert torch.equal(other(x), before)
        pack(loaded, tmp_path / "wide.bfmoe", angles="fp32", gains="fp32")
        wide = load_packed(tmp_path / "wide.bfmoe", build())
        assert torch.equal(wide(x), before)
        pack(wide, tmp_path / "back.bfmoe", angles="int8")
    assert settings_of(tmp_path / "back.bfmoe") == ("int8", "float16")


def test_the_rest_and_the_router_in_bfloat16(swapped, dense, file, tmp_path):
    model = swapped()
    wide, narrow = pack(model, tmp_path / "wide.bfmoe"), pack(model, file, rest="bf16")
    assert narrow.layers[0].parts["router"] == wide.layers[0].parts["router"] // 2 + 2 * 3
    stored = load_file(file)
    assert stored["embed.weight"].dtype == stored["blocks.0.fc1.router.weight"].dtype
    assert stored["steps"].dtype == torch.int64
    loaded = load_packed(file, dense())
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.embed.weight.dtype == torch.bfloat16
    weight = loaded.blocks[0].fc1.router.weight
    assert torch.equal(weight, model.blocks[0].fc1.router.weight.bfloat16().float())
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16())


def test_a_layers_constructor_arguments_travel(file):
    class Model(nn.Sequential):
        hparams = {"width": 6, "note": "ä", "odd": object(), "nan": float("nan"), 3: 4}

    pack(Model(*build()), file)
    assert read_packed(file).header.init == {"width": 6, "note": "ä"}


def test_damage_is_refused(coded, tmp_path):
    good, path, model = coded.read_bytes(), tmp_path / "bad.bfmoe", build()
    before, rng = state(model), random.Random(5)
    data_bits = 8 * (len(good) - 8 - header_length(good))
    for number in range(500):  # header and data in turn
        data = bytearray(good)
        bit = rng.randrange(8 * len(good))
        if number % 2:
            bit = 8 * len(good) - 1 - rng.randrange(data_bits)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data if number % 5 else good[: bit // 8])
        with pytest.raises(PackedFileError, match="damaged|[Ww]rite|newer"):
            load_packed(path, model)
        assert state(model) == before


def forged(file, name, at, value):
    """The file with some bytes of one tensor changed, and all checksums made to fit."""
    good = file.read_bytes()
    size = header_length(good)
    spec = json.loads(good[8 : 8 + size])[name]
    first, end = (8 + size + offset for offset in spec["data_offsets"])
    data = bytearray(good)
    data[first + at : first + at + len(value)] = value
    sealed = f"{spec['dtype']}:{spec['shape']}:".encode() + data[first:end]

    def change(header, inner):
        inner["tensors"][name]["sha256"] = hashlib.sha256(sealed).hexdigest()

    return resealed(bytes(data), change)


ANGLES, GAINS = "1.experts.up.rotate_in", "1.experts.up.gain_out"


@pytest.mark.parametrize(
    ("kind", "name", "at", "value", "match"),
    [
        ("int8", ANGLES + ".codes", 3, b"\x80", "8-bit codes lie in -127..127"),
        ("int4", ANGLES + ".codes", 0, b"\x08", "4-bit codes lie in -7..7"),
        ("int4", ANGLES + ".codes", 1, b"\x98", "filled-up ones are 0"),
        ("int8", GAINS + ".codes", 9, b"\x80", "8-bit codes lie in"),
        ("int8", ANGLES + ".scales", 0, b"\x00\x7e", "finite and not negative"),  # NaN
        ("int4", ANGLES + ".scales", 2, b"\x00\x7c", "finite and not negative"),  # infinite
        ("int8", GAINS + ".scales", 0, b"\x01\x80", "finite and not negative"),
    ],
)
def test_codes_that_no_encoder_writes_are_refused(kind, name, at, value, match, file):
    pack(build(), file, **CODED[kind])
    model = build()
    before = state(model)
    file.write_bytes(forged(file, name, at, value))
    with pytest.raises(PackedFileError, match=match):
        load_packed(file, model)
    assert state(model) == before


@pytest.mark.parametrize(
    ("old_file", "kinds"),
    [("version_1", ("float16", "float16")), ("version_2", ("int8", "int8"))],
)
def test_older_files_are_read_and_packed_anew(old_file, kinds, file):
    path = OLD.with_name(f"{old_file}.bfmoe")

    def old():
        model = nn.Sequential(nn.Linear(3, 4), ButterflyMoE(4, 6, 2, gains=True))
        return model.append(nn.Linear(4, 2))

    loaded = load_packed(path, old())
    stored = load_file(path)
    state_dict = {k: v for k, v in loaded.state_dict().items() if not k.endswith("_extra_state")}
    assert set(state_dict) == set(stored)
    assert all(torch.equal(state_dict[name], stored[name]) for name in stored)
    assert settings_of(path) == kinds
    assert loaded[1].settings["correction_rank"] == 0
    report = inspect_packed(path)
    assert report.layers[0].plan.bytes() == report.layer_bytes
    pack(loaded, file)
    assert read_packed(file).container.metadata["format_version"] == "3"
    again = load_file(file)
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("angles", "int8", "version 1 has its encoding"),
        ("gains", "float16", "version 1 has its encoding"),
        ("bits", "3", "known encoding"),
    ],
)
def test_version_1_has_no_words_of_version_2(key, value, match, file):
    def change(header, inner):
        inner["layers"][0][key] = value

    file.write_bytes(resealed(OLD.read_bytes(), change))
    with pytest.raises(PackedFileError, match=match):
        inspect_packed(file)
