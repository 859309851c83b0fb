"""What every test stands on: poisoned memory, one seed, no network, an honest summary."""

import os

# Before torch or a Hub client is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

POISONED_CALLER = "lightning_bfmoe"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill uninitialised memory with what no result can hide: NaN, or the largest integer."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype is not torch.bool:
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def poisoning(original):
    """Wrap a source of uninitialised memory; only calls from our package are touched."""

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        # A graph that is being compiled keeps the plain call: frames cannot be traced.
        if torch.compiler.is_compiling() or not isinstance(result, torch.Tensor):
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        inside = caller == POISONED_CALLER or caller.startswith(POISONED_CALLER + ".")
        return poison(result) if inside else result

    return wrapper


def pytest_configure(config):
    # `with torch.device(...)` knows the factories by identity, from a cache: fill it first.
    _device_constructors()
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        setattr(owner, name, poisoning(getattr(owner, name)))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def one_seed():
    """Every test starts from the same state of every global generator."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third-party code draws from it)
    torch.manual_seed(0)


@pytest.fixture
def rng_untouched():
    """Fail a test during which torch's global generator moved."""
    before = torch.get_rng_state()
    yield
    moved = not torch.equal(before, torch.get_rng_state())
    assert not moved, "the global generator was moved; draw from a torch.Generator of your own"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Say in one line how many GPU tests did not run, instead of hiding them among the skips."""
    skipped = terminalreporter.stats.get("skipped", [])
    missing = sum("gpu" in report.keywords for report in skipped)
    if missing:
        terminalreporter.write_line(
            f"{missing} test(s) marked 'gpu' did not run: no GPU kernel is proven by this run."
        )
