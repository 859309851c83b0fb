"""Ternary quantiser: optimum by brute force, idempotence, straight-through gradient, packing."""

import itertools

import pytest
import torch

from lightning_bfmoe.errors import ConfigError, PackedFileError, ShapeError
from lightning_bfmoe.functional import (
    check_finite,
    dequantize_ternary,
    pack_trits,
    packed_size,
    quantize_ternary,
    ternarize,
    unpack_trits,
)

SCALES = [(s, g) for s in ("lstsq", "absmean") for g in ("row", "tensor")]


def test_lstsq_is_the_optimum_over_all_ternary_rows():
    w = torch.randn(20, 6, dtype=torch.float64)
    trits, alpha = ternarize(w)
    ours = (w - alpha * trits).square().sum(dim=1)
    every = torch.tensor(list(itertools.product([-1.0, 0, 1], repeat=6)), dtype=torch.float64)[None]
    dots = (w[:, None] * every).sum(-1)  # (rows, 729)
    best_alpha = dots / every.square().sum(-1).clamp(min=1)
    errors = (w[:, None] - best_alpha[..., None] * every).square().sum(-1).min(dim=1).values
    torch.testing.assert_close(ours, errors, rtol=1e-12, atol=1e-12)


def test_absmean_is_bitnets_formula():
    w = torch.tensor([[0.5, -1.0, 0.1, 0.0]])
    trits, alpha = ternarize(w, "absmean")
    assert trits.tolist() == [[1, -1, 0, 0]]
    torch.testing.assert_close(alpha, torch.tensor([[0.4]]))


def test_gaussian_rows_meet_the_theory():
    w = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    for scale, expected in (("lstsq", 0.190), ("absmean", 0.263)):
        trits, alpha = ternarize(w, scale)
        error = (w - alpha * trits).square().mean() / w.square().mean()
        assert abs(error - expected) < 0.01


def test_lstsq_leaves_a_ternary_matrix_as_it_is_and_absmean_does_not():
    trits, alpha = ternarize(torch.randn(5, 32))
    grid = alpha * trits
    again, alpha_again = ternarize(grid)
    assert torch.equal(again, trits)
    torch.testing.assert_close(alpha_again, alpha, rtol=1e-6, atol=0)
    assert (ternarize(grid, "absmean")[1] < 0.9 * alpha).all()  # shrinks by the density


@pytest.mark.parametrize(("scale", "granularity"), SCALES)
def test_shapes_and_values(scale, granularity):
    trits, alpha = ternarize(torch.randn(4, 7), scale, granularity)
    assert trits.dtype == torch.int8 and set(trits.unique().tolist()) <= {-1, 0, 1}
    assert alpha.shape == ((4, 1) if granularity == "row" else (1, 1))


@pytest.mark.parametrize("scale", ["lstsq", "absmean"])
def test_a_row_of_zeros_stays_zero(scale):
    assert quantize_ternary(torch.zeros(2, 5), scale=scale).abs().max() == 0


@pytest.mark.parametrize(("scale", "granularity"), SCALES)
def test_blend_runs_from_latent_to_exactly_ternary(scale, granularity):
    w = torch.randn(6, 10)
    target = dequantize_ternary(*ternarize(w, scale, granularity))
    assert torch.equal(quantize_ternary(w, 0.0, scale, granularity), w)
    assert torch.equal(quantize_ternary(w, 1.0, scale, granularity), target)
    half = quantize_ternary(w, torch.tensor(0.5), scale, granularity)
    torch.testing.assert_close(half, (w + target) / 2)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_gradient_is_straight_through(blend):
    w = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (quantize_ternary(w, blend) * upstream).sum().backward()
    assert torch.equal(w.grad, upstream)


def test_bad_settings():
    with pytest.raises(ConfigError, match="'lstsq' or 'absmean': got 'max'"):
        ternarize(torch.ones(1, 2), "max")
    with pytest.raises(ConfigError, match="'row' or 'tensor': got 'column'"):
        ternarize(torch.ones(1, 2), granularity="column")
    with pytest.raises(ShapeError, match=r"at least one number: got shape \(0, 4\)"):
        ternarize(torch.ones(0, 4))


def test_nan_is_named_and_stays_visible():
    w = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    with pytest.raises(
        ShapeError, match="up.latent must hold finite numbers: got 1 NaN or infinite of 4"
    ):
        check_finite(w, "up.latent")
    for scale in ("lstsq", "absmean"):
        assert quantize_ternary(w, scale=scale)[0].isnan().any()


@pytest.mark.parametrize("bits", ["1.6", "2"])
@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (6,), (7, 13), (2, 3, 5), (0,)])
def test_packing_is_exact(bits, shape):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_trits(trits, bits)
    assert packed.numel() == packed_size(trits.numel(), bits)
    assert torch.equal(unpack_trits(packed, shape, bits), trits)


@pytest.mark.parametrize("bits", ["1.6", "2"])
def test_every_byte_is_either_one_code_or_refused(bits):
    per_byte = 5 if bits == "1.6" else 4
    accepted = 0
    for value in range(256):
        byte = torch.tensor([value], dtype=torch.uint8)
        try:
            trits = unpack_trits(byte, (per_byte,), bits)
        except PackedFileError:
            continue
        accepted += 1
        assert pack_trits(trits, bits).item() == value
    assert accepted == 3**per_byte


def test_bad_packing():
    with pytest.raises(ConfigError, match=r"bits must be one of .*got '1.58'"):
        pack_trits(torch.zeros(5, dtype=torch.int8), "1.58")
    with pytest.raises(ShapeError, match="trits are -1, 0 or 1: got values from 0 to 2"):
        pack_trits(torch.tensor([0, 2], dtype=torch.int8))
    with pytest.raises(PackedFileError, match=r"\(7,\) trits at 1.6 bit take 2 bytes: got 3 bytes"):
        unpack_trits(torch.zeros(3, dtype=torch.uint8), (7,))
    with pytest.raises(PackedFileError, match="non-zero padding"):
        unpack_trits(torch.tensor([242], dtype=torch.uint8), (4,))
