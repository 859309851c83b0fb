"""Activation quantisation: the grid, the gradient, the blend, every dtype."""

import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional import apply_butterfly, hadamard_angles, round_rows
from lightning_bfmoe.functional import quantize_activations as quantize


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_rows_stand_on_the_grid_and_err_by_half_a_step_at_most(bits):
    x = torch.randn(20, 33, dtype=torch.float64) * torch.rand(20, 1, dtype=torch.float64)
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    integers = round_rows(x, bits) / step
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    assert integers.abs().amax(1).round().eq(2 ** (bits - 1) - 1).all()
    assert ((round_rows(x, bits) - x).abs() <= step / 2 * (1 + 1e-12)).all()


def test_each_row_has_its_own_scale_and_zero_rows_stay_zero():
    x = torch.randn(4, 16)
    x[2] = 0
    scaled = x * torch.tensor([[1.0], [1024.0], [1.0], [2.0**-10]])
    torch.testing.assert_close(round_rows(scaled, 4)[1], round_rows(x, 4)[1] * 1024, rtol=0, atol=0)
    assert round_rows(x, 8)[2].eq(0).all()
    assert round_rows(x.reshape(2, 2, 16), 8).equal(round_rows(x, 8).reshape(2, 2, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype):
    x = torch.randn(30, 64).to(dtype)
    assert round_rows(x, 8).equal(round_rows(x.float(), 8).to(dtype))


def test_not_a_number_stays_visible():
    x = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]])
    assert round_rows(x, 8).isnan().tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_the_gradient_passes_straight_through(blend):
    x = torch.randn(5, 8, requires_grad=True)
    upstream = torch.randn(5, 8)
    y = quantize(x, 4, torch.tensor(blend))
    y.backward(upstream)
    assert x.grad.equal(upstream)
    exact = {0.0: x, 1.0: round_rows(x, 4)}
    if blend in exact:
        assert y.equal(exact[blend])
    else:
        torch.testing.assert_close(y, (x + round_rows(x, 4)) / 2)


def test_lambda_is_a_tensor_that_never_recompiles():
    # in a process of its own: dynamo does not trace through the shape checker of the tests
    code = """
        import torch
        from lightning_bfmoe.functional import quantize_activations
        graphs = []
        def count(graph, _):
            graphs.append(graph)
            return graph.forward
        step = torch.compile(quantize_activations, backend=count, fullgraph=True)
        for value in (0.0, 0.3, 1.0):
            step(torch.randn(3, 8), 8, torch.tensor(value))
        print(len(graphs))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["1"], done.stderr[-3000:]


def test_the_outlier_claim_can_be_tested():
    # at 4 bits a spike costs nearly all other numbers; behind a Hadamard rotation it does not
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[:, 9] += 60
    angles = hadamard_angles(256)
    rotated = apply_butterfly(x, angles, inverse=True)
    back = apply_butterfly(round_rows(rotated, 4), angles)
    assert (back - x).norm() < 0.7 * (round_rows(x, 4) - x).norm()


@pytest.mark.parametrize("bits", [1, 17, True, 4.0, None])
def test_other_widths_are_an_error(bits):
    function = getattr(round_rows, "__wrapped__", round_rows)
    with pytest.raises(ConfigError, match="integer number of bits from 2 to 16"):
        function(torch.ones(1, 2), bits)
