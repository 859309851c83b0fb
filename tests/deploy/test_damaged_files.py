"""Thousands of damaged files: each is refused with a clear error, and the model stays as it was."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_bfmoe.deploy import inspect_packed, load_packed, pack
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.layers import ButterflyMoE


def build():
    return nn.Sequential(nn.Linear(3, 4), ButterflyMoE(4, 6, 2, gains=True), nn.Linear(4, 2))


def state(model):
    return [(id(module), name) for name, module in model.named_modules()], [
        (name, "_extra" in name or id(tensor), tensor.dtype, tensor.detach().numpy().tobytes())
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]  # settings are encoded anew at each call, so only their bytes can be compared


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.bfmoe"
    pack(build(), path)
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """Writes bytes to a file and demands that loading them fails and changes nothing."""
    path, model = tmp_path / "bad.bfmoe", build()
    before = state(model)

    def check(data, match=None):
        path.write_bytes(data)
        with pytest.raises(PackedFileError, match=match):
            load_packed(path, model)
        assert state(model) == before

    return check


def header_length(data):
    return struct.unpack("<Q", data[:8])[0]


def test_every_cut_is_refused(good, refused):
    lengths = {*range(64), *random.Random(0).sample(range(len(good)), 600), len(good) - 1}
    for length in lengths:
        refused(good[:length])


def test_every_flipped_bit_is_refused(good, refused):
    rng = random.Random(1)
    bits = {*range(64), *rng.sample(range(8 * len(good)), 2500)}
    bits |= {8 * (8 + header_length(good) - 1 - i) + b for i in range(8) for b in range(8)}
    for bit in bits:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        refused(bytes(data))


def test_every_edit_is_refused(good, refused):
    rng = random.Random(2)
    for _ in range(800):
        a, b = sorted(rng.sample(range(len(good)), 2))
        kind = rng.randrange(4)
        data = {
            0: good[:a] + rng.randbytes(rng.randint(1, 9)) + good[a:],  # inserted
            1: good[:a] + good[b:],  # taken out
            2: good[:a] + rng.randbytes(b - a) + good[b:],  # overwritten
            3: good + rng.randbytes(rng.randint(1, 99)),  # appended
        }[kind]
        refused(data)


@pytest.mark.parametrize(
    "length", [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 100, 16 << 20]
)
def test_a_header_length_that_lies_is_refused(good, refused, length):
    refused(struct.pack("<Q", length) + good[8:], match="header must")


def resealed(data, change):
    """The file with a changed header and the digest that fits it, as a forger writes it."""
    import hashlib

    size = header_length(data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["digest"] = "0" * 64
    text = header["__metadata__"]["header"]
    inner = json.loads(text)
    change(header, inner)
    if header["__metadata__"].get("header") == text:
        header["__metadata__"]["header"] = json.dumps(inner)
    raw = json.dumps(header, ensure_ascii=False).encode()
    digest = hashlib.sha256(raw).hexdigest().encode()
    raw = raw.replace(b"0" * 64, digest, 1)
    return struct.pack("<Q", len(raw)) + raw + data[8 + size :]


def test_resealing_alone_changes_nothing(good, tmp_path):
    path = tmp_path / "same.bfmoe"
    path.write_bytes(resealed(good, lambda header, inner: None))
    load_packed(path, build())


WEIGHT = "0.weight"
ANGLES = "1.experts.up.rotate_in.angles"
PACKED = "1.experts.up.substrate.packed"


def set_spec(name, key, value):
    return lambda header, inner: header[name].__setitem__(key, value)


def set_config(key, value):
    return lambda header, inner: inner["layers"][0]["config"].__setitem__(key, value)


def set_layer(key, value):
    return lambda header, inner: inner["layers"][0].__setitem__(key, value)


def set_inner(key, value):
    return lambda header, inner: inner.__setitem__(key, value)


def set_meta(key, value):
    return lambda header, inner: header["__metadata__"].__setitem__(key, value)


def forget(name):
    def change(header, inner):
        del inner["tensors"][name]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_spec(WEIGHT, "shape", [2**40, 2**40]), "span dtype and shape"),
        (set_spec(WEIGHT, "shape", [-3, -4]), "lists of counts"),
        (set_spec(WEIGHT, "shape", [3.0, 4]), "lists of counts"),
        (set_spec(WEIGHT, "shape", [True, 12]), "lists of counts"),
        (set_spec(WEIGHT, "shape", [4, 3, 1]), "checksum|same shape"),
        (set_spec(WEIGHT, "dtype", "I32"), "kind of numbers"),
        (set_spec(WEIGHT, "dtype", "Q4"), "dtype must be one of"),
        (set_spec(WEIGHT, "dtype", ["F32"]), "dtype must be one of"),
        (set_spec(WEIGHT, "data_offsets", [0, 2**61]), "span dtype and shape"),
        (set_spec(WEIGHT, "data_offsets", [0, 48]), "without holes"),
        (set_spec(WEIGHT, "extra", 1), "dtype, shape and data_offsets"),
        (set_spec(PACKED, "dtype", "I8"), "follow from its settings"),
        (set_meta("format_version", "4"), "newer lightning-bfmoe"),
        (set_meta("format_version", "one"), "positive number"),
        (set_meta("format_version", "1"), "no init and no example"),
        (set_meta("format_version", "2"), "version 2 has no correction"),
        (set_meta("format", "other"), "format 'bfmoe'"),
        (set_meta("header", "[" * 100000), "shallow JSON|must be JSON"),
        (set_meta("header", '{"library": NaN}'), "finite"),
        (set_meta("header", '{"library": 1e999}'), "finite"),
        (set_meta("header", '{"library": 1, "library": 2}'), "each key once"),
        (set_meta("header", '{"library": "\\ud800"}'), "surrogate"),
        (set_meta("header", "{" * 3), "must be JSON"),
        (set_meta("header", "{}"), "has the fields"),
        (set_inner("more", 1), "has the fields"),
        (set_inner("layers", {}), "must be a list"),
        (set_inner("tensors", []), "must be a dict"),
        (set_inner("aliases", {"2.bias": "nothing"}), "alias must point"),
        (set_inner("aliases", {"2.more": "2.bias"}), "same tensors"),
        (set_inner("extra_state", {"0": 1}), "same extra states"),
        (set_inner("extra_state", 3), "extra_state"),
        (set_inner("init", []), "must be dicts"),
        (set_inner("example", {"inputs": []}), "inputs and output"),
        (set_inner("example", {"inputs": ["0.weight"], "output": "2.bias"}), "names its tensors"),
        (set_inner("example", {"inputs": [[]], "output": {}}), "names its tensors"),
        (forget("2.bias"), "same tensors"),
        (set_layer("path", "9"), "known part and layer"),
        (set_layer("kind", "Linear"), "known kind"),
        (set_layer("kind", "ButterflyExperts"), "same settings"),
        (set_layer("bits", "2"), "follow from its settings"),
        (set_layer("angles", "float32"), "follow from its settings"),
        (set_layer("angles", "int8"), "has all its tensors"),
        (set_layer("angles", ["int8"]), "known encoding"),
        (set_layer("gains", "int4"), "known encoding"),
        (set_layer("router", "bfloat16"), "follow from its settings"),
        (set_layer("correction", "int8"), "known encoding"),
        (set_config("correction_rank", -1), "correction_rank lies in 0 to"),
        (set_config("correction_rank", True), "correction_rank lies in 0 to"),
        (set_config("correction_rank", 2), "same settings"),
        (set_layer("placement", {"path": "2"}), "placement says"),
        (set_layer("placement", {"path": 2}), "well formed"),
        (set_config("d_model", 2**30), "same settings"),
        (set_config("d_ff", -1), "must be a count"),
        (set_config("num_experts", 2.0), "must be a count"),
        (set_config("num_experts", True), "must be a count"),
        (set_config("gated", 1), "true or false"),
        (set_config("activation", None), "must be a name"),
        (set_config("activation", "relu"), "same settings"),
        (set_config("top_k", 5), "same settings"),
        (set_config("dropout", "often"), "must make a layer"),
        (set_config("unknown", 1), "same settings"),
    ],
)
def test_a_forged_header_is_refused(good, refused, change, match):
    refused(resealed(good, change), match=match)


def test_random_forgeries_never_crash(good, tmp_path):
    rng = random.Random(3)
    path = tmp_path / "forged.bfmoe"
    odd = [None, True, -1, 0, 2**70, 1e300, "", "x" * 99, [], [[]], {}, {"a": 1}, "float16", "2"]

    def places(node, trail=()):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield node, key
            if isinstance(value, dict | list):
                yield from places(value, (*trail, key))

    def change(header, inner):
        root = rng.choice([header, inner, inner])
        node, key = rng.choice(list(places(root)))
        if rng.random() < 0.3:
            del node[key]
        elif isinstance(node, dict) and rng.random() < 0.2:
            node[rng.choice(["", "x", "__metadata__", "0.weight"])] = node.pop(key)
        else:
            node[key] = rng.choice(odd)

    loaded = 0
    for _ in range(1500):
        try:
            path.write_bytes(resealed(good, change))
        except (TypeError, KeyError, AttributeError):  # the forger's own tool gave up
            continue
        model = build()
        before = state(model)
        try:
            load_packed(path, model)
            loaded += 1
        except PackedFileError:
            assert state(model) == before
    assert loaded < 300  # harmless ones: the library's name, settings of the training


def test_trits_that_no_encoder_writes_are_refused(good, refused):
    import hashlib

    def forge(value):
        data = bytearray(good)
        size = header_length(good)
        spec = json.loads(data[8 : 8 + size])[PACKED]
        data[8 + size + spec["data_offsets"][0]] = value
        start, end = spec["data_offsets"]
        body = bytes(data[8 + size + start : 8 + size + end])
        digest = hashlib.sha256(f"U8:{spec['shape']}:".encode() + body).hexdigest()

        def change(header, inner):
            inner["tensors"][PACKED]["sha256"] = digest

        return resealed(bytes(data), change)

    refused(forge(250), match="pack_trits writes")


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "pipe", "empty", "text", "pickle", "tensors"]
)
def test_foreign_things_are_refused(kind, tmp_path):
    path = tmp_path / "thing"
    match = "format 'bfmoe'"
    if kind == "missing":
        match = "readable"
    elif kind == "folder":
        path.mkdir()
        match = "regular file"
    elif kind == "pipe":
        os.mkfifo(path)
        match = "regular file"
    elif kind == "empty":
        path.write_bytes(b"")
        match = "at least 8 bytes"
    elif kind == "text":
        path.write_text("weights, honestly\n" * 99)
        match = "header must fit"
    elif kind == "pickle":
        torch.save(build().state_dict(), path)
        match = "torch pickle"
    else:
        save_file({"a": torch.ones(2)}, path)
    for read in (inspect_packed, lambda file: load_packed(file, build())):
        with pytest.raises(PackedFileError, match=match):
            read(path)


def test_a_flipped_bit_in_the_header_is_seen_by_inspect(good, tmp_path):
    path = tmp_path / "bad.bfmoe"
    position = good.index(b'"F16"') + 2
    path.write_bytes(good[:position] + b"3" + good[position + 1 :])
    with pytest.raises(PackedFileError, match="match its digest"):
        inspect_packed(path)
