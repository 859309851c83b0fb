"""The compiled sum over a token's experts against its definition."""

import pytest
import torch

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional import group_by_expert
from lightning_bfmoe.functional.routing import combine as definition
from lightning_bfmoe.kernels import choose, combine, library, use_kernel
from lightning_bfmoe.kernels.combine import combined, combined_backward

pytestmark = pytest.mark.skipif(bool(library.missing_cpu()), reason=library.missing_cpu() or "-")


def case(tokens, k, d):
    groups = group_by_expert(torch.randint(0, 5, (tokens, k)), 5)
    rows = torch.randn(tokens * k, d, requires_grad=True)
    return rows, torch.rand(tokens, k, requires_grad=True), groups


@pytest.mark.parametrize("sizes", [(0, 2, 8), (1, 1, 3), (1, 3, 40), (130, 2, 33), (70, 4, 256)])
def test_output_and_gradients_equal_the_definition(sizes):
    rows, weights, groups = case(*sizes)
    upstream = torch.randn(sizes[0], sizes[2])
    found = []
    for run, wide in ((combine, False), (definition, False), (definition, True)):
        inputs = [t.detach().double() if wide else t.detach() for t in (rows, weights)]
        inputs = [t.requires_grad_() for t in inputs]
        y = run(*inputs, groups)
        found.append((y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))))
    for ours, plain, true in zip(*found, strict=True):
        assert ours.shape == true.shape
        assert (ours - true).norm() <= 2 * (plain - true).norm() + 1e-7 * true.norm()


def test_strided_rows_threads_and_second_derivatives():
    rows, weights, groups = case(2000, 2, 600)
    before, wide = torch.get_num_threads(), torch.randn(600, 4000)
    one = combine(wide.t(), weights, groups)
    torch.set_num_threads(3)
    try:
        assert torch.equal(combine(wide.t(), weights, groups), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(combine(wide.t().contiguous(), weights, groups), one)
    rows, weights, groups = case(6, 2, 8)
    seconds = []
    for kernel in ("cpu", "reference"):
        with use_kernel("combine", kernel):
            y = combine(rows, weights, groups).pow(3).sum()
        first = torch.autograd.grad(y, (rows, weights), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.sin().sum() for g in first), (rows, weights)))
    torch.testing.assert_close(*seconds)


def test_opcheck_and_what_is_refused():
    rows, weights, groups = case(4, 2, 6)
    torch.library.opcheck(combined, (rows, weights, groups.order))
    fixed = torch.randn(4, 6), rows.detach(), weights.detach(), groups.order
    torch.library.opcheck(combined_backward, fixed)
    with pytest.raises(ShapeError, match=r"a row for each slot .* got 7 rows"):
        combined(rows[:7], weights, groups.order)
    with pytest.raises(ShapeError, match=r"permutation of the slots: got \[0, 0"):
        combined(rows, weights, torch.zeros(8, dtype=torch.int64))
    assert choose("combine", rows, weights, groups).name == "cpu"
    assert choose("combine", rows.bfloat16(), weights, groups).name == "reference"
