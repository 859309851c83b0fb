"""Every kernel of `rotate` against the reference: outputs, gradients, low precision, odd loads."""

import pytest
import torch

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional import group_by_expert, num_pairs, num_stages
from lightning_bfmoe.kernels import choose, describe, kernels, rotate, use_kernel
from lightning_bfmoe.kernels.blocks import block_factor, factor_stages, tile_rows
from lightning_bfmoe.kernels.library import missing_cpu
from lightning_bfmoe.kernels.rotation import rotate_reference

FAST = [
    pytest.param(k.name, marks=pytest.mark.skipif(bool(k.missing()), reason=k.missing()))
    for k in kernels("rotate")
    if k.name not in ("reference", "triton")
]
SIZES = [2, 3, 6, 8, 10, 16, 31, 48, 64, 96, 130, 256]
LOADS = {
    "spread": lambda e, n: torch.randint(0, e, (n, 1)),
    "one expert": lambda e, n: torch.full((n, 1), e - 1),
    "empty experts": lambda e, n: torch.randint(0, max(e // 2, 1), (n, 1)) * 2 % e,
}


def case(d, experts, rows, load="spread", dtype=torch.float64, stages=None):
    torch.manual_seed(d + rows)
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    angles = torch.randn(experts, stages or num_stages(d), num_pairs(d), dtype=torch.float64)
    groups = group_by_expert(LOADS[load](experts, rows), experts)
    return (
        x,
        angles.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
        groups,
    )


def run(kernel, x, angles, groups, inverse, upstream):
    with use_kernel("rotate", kernel):
        out = rotate(x, angles, groups, inverse)
    return out, *torch.autograd.grad(out, (x, angles), upstream)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_output_and_gradients_equal_the_reference(kernel, d, inverse):
    x, angles, groups = case(d, experts=3, rows=37)
    upstream = torch.randn_like(x)
    fast, slow = (run(k, x, angles, groups, inverse, upstream) for k in (kernel, "reference"))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_uneven_loads(kernel, load, rows):
    x, angles, groups = case(24, experts=6, rows=rows, load=load)
    upstream = torch.randn_like(x)
    fast, slow = (run(k, x, angles, groups, False, upstream) for k in (kernel, "reference"))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("stages", [1, 3, 5])
def test_fewer_stages(kernel, stages):
    x, angles, groups = case(64, experts=2, rows=20, stages=stages)
    upstream = torch.randn_like(x)
    fast, slow = (run(k, x, angles, groups, True, upstream) for k in (kernel, "reference"))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("d", [48, 256])
def test_low_precision_error_is_at_most_twice_plain_pytorchs(kernel, dtype, floor, d):
    """Plain PyTorch = the stages in that dtype, rounding at each; ours rounds once, at the end."""
    x, angles, groups = case(d, experts=4, rows=64)
    upstream = torch.randn_like(x)
    exact = run("reference", x, angles, groups, False, upstream)
    low = x.detach().to(dtype).requires_grad_(), angles.detach().to(dtype).requires_grad_()
    plain_out = rotate_reference(*low, groups)
    plain = (plain_out, *torch.autograd.grad(plain_out, low, upstream.to(dtype)))
    ours = run(kernel, low[0], low[1], groups, False, upstream.to(dtype))
    for ours_i, plain_i, exact_i in zip(ours, plain, exact, strict=True):
        norm = exact_i.norm()
        assert ours_i.dtype == dtype
        assert (ours_i.double() - exact_i).norm() / norm <= 2 * (
            plain_i.double() - exact_i
        ).norm() / norm + floor


@pytest.mark.parametrize("kernel", FAST)
def test_autocast_does_not_lower_the_precision(kernel):
    x, angles, groups = case(64, 4, 80, dtype=torch.float32)
    with use_kernel("rotate", kernel):
        plain = rotate(x, angles, groups)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = rotate(x, angles, groups)
    assert torch.equal(plain, under)


@pytest.mark.parametrize("kernel", ["reference", *FAST])
def test_gradcheck_and_non_contiguous_rows(kernel):
    x, angles, groups = case(6, experts=2, rows=5)
    wide = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    with use_kernel("rotate", kernel):
        assert torch.autograd.gradcheck(lambda a, b: rotate(a[:, ::2], b, groups), (wide, angles))


def test_inverse_undoes_the_rotation_and_no_rows_are_fine():
    x, angles, groups = case(48, experts=3, rows=100)
    back = rotate(rotate(x, angles, groups), angles, groups, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    none = group_by_expert(torch.zeros(0, 1, dtype=torch.int64), 3)
    assert rotate(torch.zeros(0, 48), angles.float(), none).shape == (0, 48)


@pytest.mark.parametrize(
    ("d", "stages"), [(512, 9), (2048, 11), (768, 10), (7, 5), (96, 3), (2, 1), (8192, 13)]
)
def test_factors_cover_exactly_the_regular_stages(d, stages):
    factors = factor_stages(d, stages)
    covered = [s for start, count in factors for s in range(start, start + count)]
    regular = min((d & -d).bit_length() - 1, stages)
    assert covered == list(range(regular)) and all(count <= 7 for _, count in factors)


def test_blocks_are_orthogonal():
    angles = torch.randn(2, 6, 32, dtype=torch.float64)
    blocks = block_factor(angles, 2, 3, 64)
    assert blocks.shape == (2, 2, 4, 8, 8)
    eye = torch.eye(8, dtype=torch.float64).expand_as(blocks)
    torch.testing.assert_close(blocks @ blocks.transpose(-1, -2), eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("load", LOADS)
def test_a_tile_never_mixes_experts_and_no_row_is_lost(load):
    groups = group_by_expert(LOADS[load](7, 500), 7)
    tiles = tile_rows(groups, 500)
    assert tiles.slot.unique().numel() == 500
    assert torch.equal(tiles.expert[tiles.slot // tiles.height], groups.expert)


def test_dispatch_takes_the_compiled_kernel_or_blocks_for_many_rows_and_says_so():
    x, angles, groups = case(64, experts=4, rows=100)
    compiled = not missing_cpu()
    assert choose("rotate", x, angles, groups).name == ("cpu" if compiled else "blocks")
    assert choose("rotate", x[:3], angles, groups).name == ("cpu" if compiled else "reference")
    assert "blocks" in describe() and "[forced]" not in describe()
    (line,) = [line for line in describe().splitlines() if line.startswith("rotate   cpu")]
    assert ("[cannot run: " in line) is not compiled
    with use_kernel("rotate", "reference"):
        assert choose("rotate", x, angles, groups).name == "reference"
        assert "[forced]" in describe()
    with (
        pytest.raises(ConfigError, match=r"the kernels of 'rotate' are .*got 'cuda9'"),
        use_kernel("rotate", "cuda9"),
    ):
        pass


def test_bad_shapes():
    x, angles, groups = case(8, experts=2, rows=5)
    with pytest.raises(ShapeError, match=r"got x of shape \(4, 8\), 5 entries"):
        rotate(x[:4], angles, groups)
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4\) for 2 experts"):
        rotate(x, angles[:1], groups)
    with pytest.raises(ShapeError, match=r"got \(..., 3, 3\)"):
        rotate(x, angles[:, :, :3], groups)
