"""Use of the experts: against scipy, as a stream, as metrics, over two processes."""

import math
import pickle

import pytest
import scipy.stats
import torch
from torchmetrics import MetricCollection

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional import dead_experts, expert_load, load_entropy, max_violation
from lightning_bfmoe.metrics import DeadExperts, ExpertLoad, LoadEntropy, MaxViolation
from tests.metrics.ranks import run_on_two_ranks

FUNCTIONS = {
    ExpertLoad: lambda load: load,
    LoadEntropy: load_entropy,
    MaxViolation: max_violation,
    DeadExperts: dead_experts,
}


def choice(tokens, experts=6, seed=0):
    """Uneven ids; the last expert gets nothing."""
    p = torch.tensor([5.0, 3, 1, 1, 0.5, 0])[:experts]
    return torch.multinomial(p.expand(tokens, -1), 2, generator=torch.Generator().manual_seed(seed))


def test_functions_equal_scipy_and_definitions():
    load = torch.tensor([[5, 3, 0, 0], [2, 2, 2, 2]])
    for normalized, base in ((True, 4), (False, math.e)):
        expected = scipy.stats.entropy(load.numpy(), base=base, axis=1)
        assert load_entropy(load, normalized).tolist() == pytest.approx(expected)
    assert max_violation(load).tolist() == [1.5, 0]
    assert dead_experts(load).tolist() == [2, 0]


def test_one_expert_is_in_even_use_and_no_load_is_nan():
    assert load_entropy(torch.tensor([7])).item() == 1
    assert load_entropy(torch.tensor([7]), normalized=False).item() == 0
    for function in (load_entropy, max_violation):
        assert function(torch.zeros(3)).isnan() and function(torch.zeros(1)).isnan()


@pytest.mark.parametrize("function", [load_entropy, max_violation, dead_experts])
@pytest.mark.parametrize("load", [torch.zeros(2, 0), torch.tensor(3.0)])
def test_a_load_without_experts_is_an_error(function, load):
    # the shape checker of the tests would refuse a 0-d load first
    function = getattr(function, "__wrapped__", function)
    with pytest.raises(ShapeError, match="one number per expert"):
        function(load)


@pytest.mark.parametrize("metric_class", FUNCTIONS)
def test_a_stream_equals_the_whole(metric_class):
    metric, function = metric_class(num_experts=6), FUNCTIONS[metric_class]
    parts = [choice(n, seed=n) for n in (1, 9, 60)]
    for part in parts:
        assert metric(part).equal(function(expert_load(part, 6)))
    whole = function(expert_load(torch.cat(parts), 6))
    for other in (metric, pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert other.compute().equal(whole)
    metric.reset()
    assert metric.load.sum() == 0


@pytest.mark.parametrize("metric_class", FUNCTIONS)
def test_counts_stay_integers(metric_class):
    metric = metric_class(num_experts=2).set_dtype(torch.float16)
    metric.update(torch.zeros(70_000, dtype=torch.int32))  # beyond float16
    metric.set_dtype(torch.float16)
    assert metric.load.tolist() == [70_000, 0] and metric.load.dtype == torch.int64


def test_a_collection_keeps_loads_of_different_layers_apart():
    both = {"a": LoadEntropy(4), "b": MaxViolation(4), "c": LoadEntropy(6), "d": DeadExperts(4)}
    collection = MetricCollection(both)
    for seed in range(3):
        collection.update(choice(9, experts=4, seed=seed))
    load = expert_load(torch.cat([choice(9, experts=4, seed=s) for s in range(3)]), 6)
    expected = {
        "a": load_entropy(load[:4]), "b": max_violation(load[:4]), "c": load_entropy(load),
        "d": dead_experts(load[:4]),
    }  # fmt: skip
    assert {k: v.item() for k, v in collection.compute().items()} == {
        k: v.item() for k, v in expected.items()
    }


def test_entropy_in_nats():
    metric = LoadEntropy(4, normalized=False)
    assert metric(torch.tensor([0, 1, 2, 3])).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), "non-empty integer tensor"),
        (torch.tensor([math.nan]), "float32"),
        (torch.tensor([[0, 6]]), r"0 \.\. 5: got 0 \.\. 6"),
        (torch.tensor([[-1, 2]]), r"got -1"),
    ],
)
def test_bad_ids_are_an_error(experts, message):
    metric = MaxViolation(6)
    with pytest.raises(ShapeError, match=message):
        metric.update(experts)
    assert metric.load.sum() == 0


@pytest.mark.parametrize("num_experts", [0, True, 2.0])
def test_a_bad_count_is_an_error(num_experts):
    with pytest.raises(ConfigError, match="num_experts must be an integer >= 1"):
        ExpertLoad(num_experts)


def two_ranks(rank):
    metrics = {kind.__name__: kind(num_experts=6) for kind in FUNCTIONS}
    for metric in metrics.values():
        metric.update(choice(20 + rank, seed=rank))
    return {name: metric.compute().tolist() for name, metric in metrics.items()}


def test_two_processes_equal_one():
    whole = expert_load(torch.cat([choice(20, seed=0), choice(21, seed=1)]), 6)
    expected = {kind.__name__: function(whole).tolist() for kind, function in FUNCTIONS.items()}
    assert run_on_two_ranks(two_ranks) == [expected, expected]
