"""A small seeded share of the fuzzing; `python -m tests.deploy.fuzz` is the full run."""

import random

import pytest

from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.errors import PackedFileError
from tests.deploy.fuzz import build, damage, forge, fuzz


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_are_refused_or_load(seed, tmp_path):
    found = fuzz(250, seed, tmp_path)
    assert sum(found.values()) == 250
    assert len(found) > 15  # the mutations get past the outer checks, to many a rule
    assert 0 < found["loads and computes"] < 100


def test_the_fuzzer_damages_and_its_seals_fit(tmp_path):
    path = tmp_path / "model.bfmoe"
    pack(build(), path)
    data, rng = path.read_bytes(), random.Random(0)
    assert sum(damage(data, rng) == data for _ in range(100)) < 5
    rules = set()
    for _ in range(100):
        path.write_bytes(forge(data, rng))
        try:
            load_packed(path, build())
        except PackedFileError as error:
            rules.add(error.rule)
    assert not any("match its digest" in rule or "match its checksum" in rule for rule in rules)
