"""Trits to bytes and back: 5 trits a byte (1.6 bit each) or 4 a byte (2 bit each).

Layout, both formats: the matrix is read row by row (C order) as one stream; the stream is padded
with zeros to whole bytes; the FIRST trit of a byte is its least significant digit. Each trit t is
stored as the digit t + 1, so a byte is ``sum(digit_i * 3**i)`` (0..242) or ``sum(digit_i * 4**i)``.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from lightning_bfmoe.errors import ConfigError, PackedFileError, ShapeError

_FORMATS = {"1.6": (5, 3), "2": (4, 4)}  # bits -> (trits a byte, base of a digit)


def _format(bits: str) -> tuple[int, int]:
    if bits not in _FORMATS:
        raise ConfigError(
            f"bits must be one of {tuple(_FORMATS)}",
            got=repr(bits),
            fix="Use '1.6' for the smaller file, '2' for the faster unpacking.",
        )
    return _FORMATS[bits]


def packed_size(numel: int, bits: str = "1.6") -> int:
    """Bytes that `numel` trits occupy, the last byte padded.

    Example:
        >>> packed_size(512 * 2048, "1.6"), packed_size(512 * 2048, "2")
        (209716, 262144)
    """
    return -(-numel // _format(bits)[0])


def pack_trits(trits: Int8[Tensor, "*shape"], bits: str = "1.6") -> UInt8[Tensor, " packed"]:
    """Trits as a stream of bytes.

    Example:
        >>> pack_trits(torch.tensor([1, 0, -1, 1, 1], dtype=torch.int8)).tolist()
        [221]

    Raises:
        ShapeError: A value is not -1, 0 or 1.
        ConfigError: Unknown `bits`.
    """
    per_byte, base = _format(bits)
    flat = trits.reshape(-1)
    if flat.numel() and (flat.min() < -1 or flat.max() > 1):
        raise ShapeError(
            "trits are -1, 0 or 1",
            got=f"values from {int(flat.min())} to {int(flat.max())}",
            fix="Call ternarize() first.",
        )
    pad = -flat.numel() % per_byte
    digits = torch.nn.functional.pad(flat.to(torch.int16), (0, pad)) + 1  # padding = trit 0
    weights = torch.tensor(
        [base**i for i in range(per_byte)], dtype=torch.int16, device=flat.device
    )
    return (digits.reshape(-1, per_byte) * weights).sum(dim=1).to(torch.uint8)


def unpack_trits(
    packed: UInt8[Tensor, " packed"], shape: Sequence[int], bits: str = "1.6"
) -> Int8[Tensor, "*shape"]:
    """The exact inverse of `pack_trits`.

    Example:
        >>> unpack_trits(torch.tensor([221], dtype=torch.uint8), (5,)).tolist()
        [1, 0, -1, 1, 1]

    Args:
        packed: The bytes.
        shape: Shape of the trits.
        bits: ``1.6`` or ``2``.

    Raises:
        PackedFileError: The length does not fit the shape, a byte is one that no encoder writes,
            or the padding is not zero.
    """
    per_byte, base = _format(bits)
    numel = math.prod(shape)
    if packed.numel() != packed_size(numel, bits):
        raise PackedFileError(
            f"{tuple(shape)} trits at {bits} bit take {packed_size(numel, bits)} bytes",
            got=f"{packed.numel()} bytes",
            fix="The file is damaged or was written for another shape.",
        )
    table = _table(per_byte, base, packed.device)
    trits = table[packed.long()].reshape(-1)  # (bytes * per_byte,)
    if bool((trits == _INVALID).any()) or bool((trits[numel:] != 0).any()):
        raise PackedFileError(
            "every byte of packed trits is one that pack_trits writes",
            got="bytes outside the code or non-zero padding",
            fix="The file is damaged; pack the model again.",
        )
    return trits[:numel].reshape(tuple(shape))


_INVALID = 2


def _table(per_byte: int, base: int, device: torch.device) -> Int8[Tensor, "bytes per_byte"]:
    value = torch.arange(256, device=device).unsqueeze(1)
    digits = value // torch.tensor([base**i for i in range(per_byte)], device=device) % base
    valid = (value < base**per_byte) & (digits < 3).all(dim=1, keepdim=True)
    return torch.where(valid, digits - 1, _INVALID).to(torch.int8)
