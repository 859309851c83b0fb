"""Codes with scales: the nearest code, the best of the tried scales, and exact bytes."""

import pytest
import torch

from lightning_bfmoe.errors import ConfigError, PackedFileError
from lightning_bfmoe.functional import (
    code_bytes,
    decode_codes,
    encode_codes,
    pack_nibbles,
    unpack_nibbles,
)
from lightning_bfmoe.functional.codes import check_codes


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("std", [1e-6, 0.02, 0.5, 3.0])
def test_every_code_is_the_nearest_one_to_its_number(bits, std):
    values = std * torch.randn(5, 3, 33, dtype=torch.float64)
    codes, scales = encode_codes(values, bits)
    top = 2 ** (bits - 1) - 1
    assert codes.abs().max() <= top
    grid = torch.arange(-top, top + 1, dtype=torch.float64)
    wanted = (values.unsqueeze(-1) - scales.double()[..., None, None] * grid).abs().amin(-1)
    found = (values - decode_codes(codes, scales).double()).abs()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_larger_error_than_with_the_plain_scale(bits):
    values = torch.randn(40, 64, dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    plain = (values.abs().amax(1, keepdim=True) / top).half().double()
    error = ((values / plain).round().clamp(-top, top) * plain - values).square().sum(1)
    ours = (decode_codes(*encode_codes(values, bits)).double() - values).square().sum(1)
    assert (ours <= error).all()
    assert (ours < error).any() or bits == 8  # clipping pays where codes are few


def test_rows_of_zeros_and_gains_of_one_are_exact():
    values = torch.zeros(2, 6)
    assert torch.equal(decode_codes(*encode_codes(values, 4)), values)
    ones = torch.ones(2, 6)
    codes, scales = encode_codes(ones, 8, offset=1.0)
    assert torch.equal(decode_codes(codes, scales, offset=1.0), ones)


def test_decoding_is_exact_in_float32():
    codes, scales = encode_codes(torch.randn(50, 200), 8)
    exact = codes.double() * scales.double().unsqueeze(-1)
    assert torch.equal(decode_codes(codes, scales).double(), exact)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_nibbles_come_back(n):
    codes = torch.randint(-7, 8, (3, 4, n), dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, 4, code_bytes(n, 4))
    assert torch.equal(unpack_nibbles(packed, n), codes)
    check_codes(packed, torch.ones(3, 4).half(), n, 4)


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"codes have one of \(8, 4\) bits: got 6"):
        encode_codes(torch.ones(2, 2), 6)
    for scales in ([[-1.0]], [[float("inf")]], [[float("nan")]]):
        with pytest.raises(PackedFileError, match="finite and not negative"):
            check_codes(torch.zeros(1, 1, 2, dtype=torch.int8), torch.tensor(scales), 2, 8)
