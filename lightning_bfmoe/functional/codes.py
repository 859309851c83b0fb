"""Numbers as small integers: rows of angles or gains at 8 or 4 bit, one scale a row.

A row v is kept as integers c and one float16 scale s,

    v ~ offset + s * c,    c in -127..127 (8 bit) or -7..7 (4 bit)

where s minimises the squared error of the row among fractions of its largest magnitude: at 4 bit it
pays to clip the few largest angles. The product s * c has at most 18 significant bits, so decoding
is exact in float32 (offset 0) and equal on every machine.
"""

import torch
from jaxtyping import Float, Float16, Int8, UInt8
from torch import Tensor

from lightning_bfmoe.errors import ConfigError, PackedFileError

CODE_BITS = (8, 4)
SCALE_BYTES = 2
"""A scale is one float16."""
_CLIPS = {8: [1.0 - 0.05 * i for i in range(9)], 4: [1.0 - 0.05 * i for i in range(15)]}


def code_bytes(numbers: int, bits: int) -> int:
    """Bytes of a row of codes; a row of 4-bit codes is filled up to whole bytes.

    Example:
        >>> code_bytes(5, 8), code_bytes(5, 4)
        (5, 3)
    """
    return -(-numbers * _check(bits) // 8)


def encode_codes(
    values: Float[Tensor, "*rows n"], bits: int, offset: float = 0.0
) -> tuple[Int8[Tensor, "*rows n"], Float16[Tensor, "*rows"]]:
    """Codes and scales with the least squared error, row by row.

    Computed in double on the CPU, so that a GPU gives the same codes.

    Example:
        >>> codes, scales = encode_codes(torch.tensor([[0.5, -1.0, 0.25]]), 8)
        >>> codes.tolist(), round(scales.item(), 5)
        ([[64, -127, 32]], 0.00787)

    Raises:
        ConfigError: `bits` is not 8 or 4.
    """
    top = 2 ** (_check(bits) - 1) - 1
    wide = values.detach().cpu().double() - offset  # (*rows, n)
    peak = wide.abs().amax(dim=-1, keepdim=True)  # (*rows, 1)
    best_codes = torch.zeros(wide.shape, dtype=torch.int8)
    best_scale = torch.zeros(peak.shape, dtype=torch.float16)
    best_error = torch.full(peak.shape, torch.inf, dtype=torch.float64)
    for clip in _CLIPS[bits]:
        scale = (clip * peak / top).to(torch.float16)  # the codes are made with the stored scale
        step = scale.double()
        codes = torch.where(step > 0, wide / step.clamp(min=2**-24), 0.0).round().clamp(-top, top)
        error = (codes * step - wide).square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_codes = torch.where(better, codes.to(torch.int8), best_codes)
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    device = values.device
    return best_codes.to(device), best_scale.squeeze(-1).to(device)


def decode_codes(
    codes: Int8[Tensor, "*rows n"], scales: Float16[Tensor, "*rows"], offset: float = 0.0
) -> Float[Tensor, "*rows n"]:
    """The float32 numbers that codes and scales stand for.

    Example:
        >>> decode_codes(*encode_codes(torch.tensor([[0.5, -1.0]]), 8)).shape
        torch.Size([1, 2])
    """
    values = codes.to(torch.float32) * scales.to(torch.float32).unsqueeze(-1)
    return values + offset if offset else values


def pack_nibbles(codes: Int8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows m"]:
    """4-bit codes, two a byte: code + 8, the first in the low half; an odd row ends with code 0.

    Example:
        >>> pack_nibbles(torch.tensor([[-7, 7, 1]], dtype=torch.int8)).tolist()
        [[241, 137]]
    """
    digits = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8) + 8
    return digits[..., 0::2] | digits[..., 1::2] << 4


def unpack_nibbles(packed: UInt8[Tensor, "*rows m"], n: int) -> Int8[Tensor, "*rows n"]:
    """The exact inverse of `pack_nibbles`.

    Example:
        >>> unpack_nibbles(torch.tensor([[241, 137]], dtype=torch.uint8), 3).tolist()
        [[-7, 7, 1]]
    """
    digits = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (digits.to(torch.int8) - 8)[..., :n]


def check_codes(packed: Tensor, scales: Tensor, n: int, bits: int) -> None:
    """Accept only what `encode_codes` writes.

    Raises:
        PackedFileError: A code below -127 or -7, a filled-up half byte that is not code 0, or a
            scale that is negative, NaN or infinite.
    """
    whole = packed if bits == 8 else unpack_nibbles(packed, 2 * packed.shape[-1])
    top = 2 ** (bits - 1) - 1
    if bool((whole < -top).any()) or bool((whole[..., n:] != 0).any()):
        raise PackedFileError(
            f"{bits}-bit codes lie in -{top}..{top}, and filled-up ones are 0",
            got="other codes",
            fix="The file is damaged; pack the model again.",
        )
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PackedFileError(
            "scales of codes are finite and not negative",
            got=f"values from {float(scales.min())} to {float(scales.max())}",
            fix="The file is damaged; pack the model again.",
        )


def _check(bits: int) -> int:
    if bits not in CODE_BITS:
        raise ConfigError(f"codes have one of {CODE_BITS} bits", got=bits, fix="Use 8.")
    return bits
