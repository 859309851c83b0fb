"""The harness does what it promises: poison inside the package only, and GPU tests never vanish."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import pytest_terminal_summary

CALLS = [
    "torch.empty(3)",
    "torch.empty_like(torch.ones(3))",
    "torch.empty_strided((3,), (1,))",
    "torch.ones(3).new_empty(3)",
    "torch.empty(3, dtype=torch.bfloat16, requires_grad=True)",
]


def evaluate(expression: str, module: str):
    """The value of an expression as if a line of `module` had computed it."""
    return eval(expression, {"torch": torch, "__name__": module})


@pytest.mark.parametrize("call", CALLS)
def test_memory_of_our_package_is_poisoned(call):
    assert evaluate(call, "lightning_bfmoe.layers.any").isnan().all()


def test_integers_are_poisoned_too():
    packed = evaluate("torch.empty(4, dtype=torch.uint8)", "lightning_bfmoe.deploy.pack")
    assert packed.tolist() == [255] * 4


@pytest.mark.parametrize("module", ["torch.nn.init", "lightning_bfmoe_other", "tests.any"])
def test_memory_of_others_is_left_alone(module):
    zeros = evaluate("torch.empty(3, out=torch.zeros(3))", module)
    assert zeros.tolist() == [0.0] * 3


def test_meta_tensors_pass():
    assert evaluate("torch.empty(3, device='meta')", "lightning_bfmoe.layers.any").is_meta


def test_a_device_context_still_works():
    with torch.device("meta"):
        assert torch.nn.Linear(2, 2).weight.is_meta
        assert evaluate("torch.empty(3)", "lightning_bfmoe.layers.any").is_meta


def test_a_compiled_graph_stays_whole():
    source = "def double(x):\n    y = torch.empty_like(x)\n    return y.copy_(x) * 2\n"
    scope = {"torch": torch, "__name__": "lightning_bfmoe.layers.any"}
    exec(source, scope)
    compiled = torch.compile(scope["double"], fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("keywords", "lines"), [({"gpu": 1}, 1), ({"slow": 1}, 0)])
def test_gpu_tests_that_did_not_run_are_named(keywords, lines):
    written = []
    skipped = [SimpleNamespace(keywords=keywords)]
    pytest_terminal_summary(SimpleNamespace(stats={"skipped": skipped}, write_line=written.append))
    assert len(written) == lines


def test_rng_untouched_allows_a_generator_of_its_own(rng_untouched):
    generator = torch.Generator().manual_seed(1)
    assert torch.rand(2, generator=generator).shape == (2,)
