"""The butterfly against independent oracles: Givens products, the Hadamard matrix, its laws."""

import math

import pytest
import torch

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional import (
    apply_butterfly,
    butterfly_matrix,
    hadamard_angles,
    num_pairs,
    num_stages,
    stage_pairs,
)

ODD_SIZES = [2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 24, 33, 48, 63, 96]


def random_angles(d, *batch, stages=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, stages or num_stages(d), num_pairs(d))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense_givens(angles, d):
    """Product of explicit d x d Givens rotations: shares no code with the library but the pairs."""
    out = torch.eye(d, dtype=angles.dtype)
    first, second = stage_pairs(d, angles.shape[0])
    for s in range(angles.shape[0]):
        for p in range(angles.shape[1]):
            i, j, t = int(first[s, p]), int(second[s, p]), angles[s, p].item()
            g = torch.eye(d, dtype=angles.dtype)
            g[i, i], g[i, j], g[j, i], g[j, j] = math.cos(t), -math.sin(t), math.sin(t), math.cos(t)
            out = g @ out
    return out


@pytest.mark.parametrize("d", ODD_SIZES)
def test_equals_the_product_of_givens_rotations(d):
    angles = random_angles(d)
    torch.testing.assert_close(
        butterfly_matrix(angles, d), dense_givens(angles, d), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("d", [*ODD_SIZES, 384, 576, 768])
def test_orthogonal_invertible_norm_keeping(d):
    angles = random_angles(d)
    matrix = butterfly_matrix(angles, d)
    assert (matrix @ matrix.T - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-12
    x = torch.randn(7, d, dtype=torch.float64)
    y = apply_butterfly(x, angles)
    assert (apply_butterfly(y, angles, inverse=True) - x).abs().max() < 1e-12
    assert (y.norm(dim=1) - x.norm(dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("d", [*range(2, 40), 65, 96, 127, 255, 384, 576])
def test_every_output_depends_on_every_input(d):
    matrix = butterfly_matrix(random_angles(d), d)
    assert (matrix.abs() > 0).all(), f"{int((matrix == 0).sum())} entries of {d}x{d} are zero"


@pytest.mark.parametrize("sizes", [range(2, 400), (768, 1536, 2047, 3072)])
def test_the_network_joins_every_pair_of_coordinates(sizes):
    """Which inputs can reach a coordinate, as bits of an integer: exact, without any angle."""
    for d in sizes:
        reach = [1 << i for i in range(d)]
        first, second = stage_pairs(d)
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            for i, j in zip(a, b, strict=True):
                reach[i] = reach[j] = reach[i] | reach[j]
        assert all(r == (1 << d) - 1 for r in reach), f"d={d} is not fully mixed"


@pytest.mark.parametrize("d", [2, 8, 64, 768, 8192])
def test_even_sizes_need_only_log2_stages(d):
    assert num_stages(d) == math.ceil(math.log2(d))


@pytest.mark.parametrize("d", [2, 4, 8, 32, 256])
def test_all_angles_pi_over_4_is_the_signed_hadamard_matrix(d):
    index = torch.arange(d)
    parity = torch.tensor([[(int(i) & int(j)).bit_count() % 2 for j in index] for i in index])
    hadamard = (1 - 2 * parity).double() / math.sqrt(d)  # Sylvester's
    sign = 1 - 2 * torch.tensor([int(i).bit_count() % 2 for i in index]).double()
    ours = butterfly_matrix(hadamard_angles(d, dtype=torch.float64), d)
    # cos -sin / sin cos is [[1, -1], [1, 1]] / sqrt(2) in each factor: Sylvester with column signs
    torch.testing.assert_close(ours, hadamard * sign, rtol=0, atol=1e-14)
    assert (ours.abs() - 1 / math.sqrt(d)).abs().max() < 1e-14


@pytest.mark.parametrize("stage", range(5))
def test_powers_of_two_use_the_papers_strides(stage):
    first, second = stage_pairs(32)
    assert (second[stage] - first[stage]).unique().tolist() == [2**stage]


@pytest.mark.parametrize("d", ODD_SIZES)
def test_a_stage_touches_each_coordinate_at_most_once(d):
    first, second = stage_pairs(d)
    for s in range(num_stages(d)):
        assert torch.cat([first[s], second[s]]).unique().numel() == 2 * num_pairs(d)


@pytest.mark.parametrize("d", ODD_SIZES)
def test_zero_angles_are_the_identity_also_with_fewer_stages(d):
    for stages in range(1, num_stages(d) + 1):
        zero = torch.zeros(stages, num_pairs(d))
        assert torch.equal(butterfly_matrix(zero, d), torch.eye(d))


@pytest.mark.parametrize("d", [5, 8, 12])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(d, inverse):
    x = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    angles = random_angles(d, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: apply_butterfly(x, a, inverse), (x, angles))


def test_one_set_of_angles_a_row_equals_a_loop():
    x, angles = torch.randn(4, 12, dtype=torch.float64), random_angles(12, 4)
    rows = torch.stack([apply_butterfly(x[i], angles[i]) for i in range(4)])
    torch.testing.assert_close(apply_butterfly(x, angles), rows, rtol=0, atol=0)


def test_input_is_left_alone():
    x = torch.randn(3, 6)
    before = x.clone()
    apply_butterfly(x, random_angles(6).float())
    assert torch.equal(x, before)


@pytest.mark.parametrize("d", [0, 1])
def test_too_narrow(d):
    with pytest.raises(ShapeError, match=f"d >= 2: got d={d}"):
        num_stages(d)


def test_wrong_number_of_pairs_or_stages():
    with pytest.raises(ShapeError, match=r"got \(..., 3, 5\).*torch.zeros\(3, 4\)"):
        apply_butterfly(torch.zeros(8), torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="1 to 3 stages: got stages=4"):
        stage_pairs(8, 4)
