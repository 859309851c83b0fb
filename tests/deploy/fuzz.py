"""Damages a packed file in thousands of ways; every reader must refuse it or load it, never crash.

    python -m tests.deploy.fuzz --mutations 10000 --seed 0

Each mutation is read by `inspect_packed`, `verify_packed` and `load_packed`. Allowed are a
`PackedFileError` (the model then is as before) and, for a forgery that is well formed, a model that
computes. Half of the mutations damage bytes; the other half are forged with a fitting digest and
checksums, so that they get past those. The process may not take more than `--memory` (4) GiB, so a
size that is believed before it is checked is noticed.
"""

import argparse
import copy
import hashlib
import json
import random
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from lightning_bfmoe.deploy import inspect_packed, load_packed, pack, verify_packed
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.layers import ButterflyMoE

ODD = [
    None, True, -1, 0, 1, 2**31, 2**62, 2**70, 0.5, 1e300, "", "x", "../../up", "/etc/passwd",
    "a\x00b", "0.weight", "float16", "int8", "2", "1.6", [], [[]], [0, 2**40], {},
    {"path": "../.."},
]  # fmt: skip


def build() -> nn.Module:
    """A model with every kind of stored tensor."""
    torch.manual_seed(0)
    layer = ButterflyMoE(4, 6, 2, gains=True, gated=True, activation="silu")
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))


def state(model: nn.Module) -> list:
    """All that loading could change."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = [(n, id(t), t.detach().numpy().tobytes()) for n, t in named_tensors(model)]
    return modules + tensors


def named_tensors(model: nn.Module) -> list:
    return [*model.named_parameters(), *model.named_buffers()]


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few bits or bytes differ, are gone, or come twice."""
    a, b = sorted(rng.sample(range(len(data)), 2))
    kind = rng.randrange(6)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            bit = rng.randrange(8 * len(data))
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)
    if kind == 1:
        return data[:a]
    if kind == 2:
        return data[:a] + data[b:]
    if kind == 3:
        return data[:a] + rng.randbytes(rng.randint(1, 16)) + data[a:]
    if kind == 4:
        return data[:a] + rng.randbytes(b - a) + data[b:]
    return struct.pack("<Q", rng.choice([0, 7, len(data), 2**31, 2**63, 2**64 - 1])) + data[8:]


def forge(data: bytes, rng: random.Random) -> bytes:
    """Header and tensors changed at random, digest and checksums made to fit again."""
    size = struct.unpack("<Q", data[:8])[0]
    outer, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    inner = json.loads(outer["__metadata__"]["header"])
    names = [name for name in outer if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.randrange(5)
        if kind <= 1:
            poke(rng.choice([outer, inner, inner]), rng)
        elif kind == 2:  # a tensor's bytes, with a checksum that fits
            first, end = _span(outer, rng.choice(names), len(body))
            body[first:end] = rng.randbytes(end - first)
        elif kind == 3:  # a tensor is missing, without a trace
            name = rng.choice(names)
            first, end = _span(outer, name, len(body))
            outer.pop(name, None)
            if isinstance(inner.get("tensors"), dict):
                inner["tensors"].pop(name, None)
            del body[first:end]
            for other in outer.values():
                span = other.get("data_offsets") if isinstance(other, dict) else None
                if isinstance(span, list) and all(type(i) is int for i in span):
                    other["data_offsets"] = [i - (end - first) * (i >= end) for i in span]
        else:  # a tensor under another name
            name, new = rng.choice(names), rng.choice(["../up", "1.more", "2.bias", "\u2603"])
            for table in (outer, inner.get("tensors")):
                if isinstance(table, dict) and name in table:
                    table[new] = table.pop(name)
    records = inner.get("tensors")
    for name, spec in outer.items():
        record = records.get(name) if isinstance(records, dict) else None
        if isinstance(record, dict) and isinstance(spec, dict) and "sha256" in record:
            first, end = _span(outer, name, len(body))
            sealed = f"{spec.get('dtype')}:{spec.get('shape')}:".encode() + body[first:end]
            record["sha256"] = hashlib.sha256(sealed).hexdigest()
    meta = outer.get("__metadata__")
    if isinstance(meta, dict):
        meta["digest"] = "0" * 64
        if isinstance(meta.get("header"), str):
            meta["header"] = json.dumps(inner)
    raw = json.dumps(outer, ensure_ascii=False).encode()
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    return struct.pack("<Q", len(raw)) + raw + bytes(body)


def _span(outer: dict, name: str, size: int) -> tuple[int, int]:
    """Where a tensor lies, within the file whatever the header says."""
    spec = outer.get(name)
    span = spec.get("data_offsets") if isinstance(spec, dict) else None
    good = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
    first, end = span if good else (0, 0)
    return (first, end) if 0 <= first <= end <= size else (0, 0)


def poke(root: object, rng: random.Random) -> None:
    """Change, remove or move one value somewhere in a JSON tree."""
    places = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)  # type: ignore[arg-type]
        for key, value in list(items):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(root)
    if not places:
        return
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.2:
        del node[key]
    elif kind < 0.35 and isinstance(node, dict):
        node[rng.choice(["", "x", "__metadata__", "0.weight", "../x"])] = node.pop(key)
    elif kind < 0.5 and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1, 8, 2**32])
    else:
        node[key] = copy.deepcopy(rng.choice(ODD))


def fuzz(mutations: int, seed: int, folder: Path) -> Counter:
    """What became of each mutation: the rule that refused it, or `loads and computes`.

    Raises:
        AssertionError: A refused file changed the model, or left one behind.
        Exception: Whatever a reader raised that is no `PackedFileError`.
    """
    good, path = folder / "good.bfmoe", folder / "mutated.bfmoe"
    pack(build(), good, angles="int8", gains="int8", example=torch.ones(2, 3), overwrite=True)
    data = good.read_bytes()
    rng, found = random.Random(seed), Counter()
    model = build()
    before = state(model)
    for number in range(mutations):
        mutated = damage(data, rng) if number % 2 else forge(data, rng)
        path.write_bytes(mutated)
        for read in (inspect_packed, verify_packed):
            try:
                read(path)
            except PackedFileError as error:
                helps = error.fix or error.got is not None
                check(helps, f"an error that helps nobody: {error}")
        try:
            loaded = load_packed(path, model)
        except PackedFileError as error:
            found[error.rule] += 1
            check(state(model) == before, f"mutation {number} changed the model: {error}")
        else:
            found["loads and computes" if mutated != data else "unchanged"] += 1
            with torch.no_grad():
                assert loaded(torch.ones(2, 3)).shape == (2, 2)
            model = build()
            before = state(model)
        assert {item.name for item in folder.iterdir()} == {good.name, path.name}
    return found


def check(good: object, text: str) -> None:
    if not good:
        raise AssertionError(text)


def main() -> None:
    """Run and print how often each rule refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=4, help="GiB for the process; 0: no limit")
    options = parser.parse_args()
    if options.memory and sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (options.memory << 30, hard))
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(options.mutations, options.seed, Path(folder))
    for rule, count in found.most_common():
        print(f"{count:6}  {rule}")  # noqa: T201
    print(f"{sum(found.values())} mutations, no crash")  # noqa: T201


if __name__ == "__main__":
    main()
