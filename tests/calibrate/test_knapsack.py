"""The knapsack against all combinations."""

import itertools
import random

import pytest

from lightning_bfmoe.calibrate import knapsack
from lightning_bfmoe.calibrate.knapsack import Option, choose, parse_bytes
from lightning_bfmoe.errors import CalibrationError


def brute(groups, budget):
    picks = itertools.product(*(range(len(g)) for g in groups))
    fits = [p for p in picks if size(groups, p) <= budget]
    return min(cost(groups, p) for p in fits) if fits else None


def size(groups, picks):
    return sum(g[i].size for g, i in zip(groups, picks, strict=True))


def cost(groups, picks):
    return sum(g[i].cost for g, i in zip(groups, picks, strict=True))


def instance(seed):
    draw = random.Random(seed)
    groups = [
        [
            Option(str(i), draw.choice([0, draw.randint(1, 60)]), draw.random())
            for i in range(draw.randint(1, 4))
        ]
        for _ in range(draw.randint(1, 6))
    ]
    return groups, draw.randint(0, 200)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_optimal(seed):
    groups, budget = instance(seed)
    wanted = brute(groups, budget)
    if wanted is None:
        with pytest.raises(CalibrationError, match="at the least"):
            choose(groups, budget)
        return
    picks = choose(groups, budget)
    assert size(groups, picks) <= budget
    assert cost(groups, picks) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_rounded_sizes_still_fit_and_lose_little(seed, monkeypatch):
    monkeypatch.setattr(knapsack, "_STATES", 2)
    groups, budget = instance(seed)
    groups = [[o._replace(size=o.size * 1000) for o in g] for g in groups]
    if brute(groups, budget * 1000) is not None:
        picks = choose(groups, budget * 1000)
        assert size(groups, picks) <= budget * 1000
        assert cost(groups, picks) <= brute(groups, int(budget * 999)) + 1e-12 if budget else True


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("40MB", 40_000_000), ("1.5 MiB", 1_572_864), ("7kb", 7000), (12, 12), ("0B", 0), ("9", 9)],
)
def test_budgets_are_read(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["forty", "-1MB", "3 TBs", "", "nanMB", True, -4, 1.5e400])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(CalibrationError, match="a budget is a number of bytes"):
        parse_bytes(text)
