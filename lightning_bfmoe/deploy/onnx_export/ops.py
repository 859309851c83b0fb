"""The two products of a packed layer as opaque torch ops, so that an exported graph can name them.

In PyTorch they compute what the packed layer computes, in float32; `lower` turns each into ONNX
nodes. Widths that are no power of two go by *deck order* there: a stage of the network rotates
neighbouring slots of a deck of cards and then un-shuffles it (`functional.butterfly`), so that
every stage of every width is the same few operations on contiguous halves.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_bfmoe.functional.butterfly import apply_butterfly, num_pairs
from lightning_bfmoe.functional.codes import decode_codes, unpack_nibbles

BLOCK = 128
"""Columns of a `MatMulNBits` block: the size with the fastest kernel (`docs/decisions.md`)."""
DOMAIN = "bfmoe"
"""Domain of the opaque nodes, and of the custom op that can take their place."""


def deck_order(d: int, stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each stage's neighbours find their angle, and how the deck lies in the end.

    An odd deck gets one more card at its end, which never leaves its slot. Its partner is not
    rotated: sign 0.

    Example:
        >>> index, sign, deck = deck_order(4, 2)
        >>> index.tolist(), deck.tolist()
        ([[0, 1], [0, 1]], [0, 1, 2, 3])

    Args:
        d: Width.
        stages: Stages of the rotation.

    Returns:
        Angle index (stages, ceil(d / 2)); its sign -1, 0 or 1, the same shape; the coordinate in
        each slot after the last stage (d, or d + 1 when d is odd).
    """
    deck = np.arange(d + d % 2)
    index, sign = [], []
    for _ in range(stages):
        left, right = deck[0::2], deck[1::2]
        low, real = np.minimum(left, right), np.maximum(left, right) < d
        rank = np.zeros(deck.size, np.int64)
        rank[np.sort(low[real])] = np.arange(int(real.sum()))
        index.append(rank[low])
        sign.append(np.where(left > right, -1, 1) * real)
        deck = np.concatenate([deck[0::2], deck[1::2]])
    return np.stack(index), np.stack(sign), deck


def code_trits(trits: Tensor) -> Tensor:
    """Trits as `MatMulNBits` reads them at 2 bit: q + 2, blocks of 128 columns, low bits first.

    The zero point of a 2-bit code is 2, so that trits are exact; a row is filled up with zeros.

    Example:
        >>> code_trits(torch.tensor([[1, 0, -1]], dtype=torch.int8))[0, 0, :2].tolist()
        [155, 170]

    Args:
        trits: (d_out, d_in) int8.

    Returns:
        (d_out, blocks, 32) uint8.
    """
    d_out, d_in = trits.shape
    codes = torch.nn.functional.pad(trits, (0, -d_in % BLOCK)).to(torch.uint8) + 2
    four = codes.reshape(d_out, -1, BLOCK // 4, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


@torch.library.custom_op("lightning_bfmoe::onnx_product", mutates_args=())
def product(x: Tensor, codes: Tensor, alpha: Tensor, d_in: int) -> Tensor:
    """Products x T^T diag(alpha) from the codes of `code_trits`; alpha is (d_out, 1) or (1, 1)."""
    digits = torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    trits = digits.reshape(codes.shape[0], -1)[:, :d_in].to(x.dtype) - 2
    return torch.nn.functional.linear(x, alpha * trits)


@product.register_fake
def _(x: Tensor, codes: Tensor, alpha: Tensor, d_in: int) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.custom_op("lightning_bfmoe::onnx_rotate", mutates_args=())
def rotate_rows(
    x: Tensor, ids: Tensor, angles: Tensor, scales: Tensor, d: int, inverse: bool
) -> Tensor:
    """Each row by its expert's B, or B^T.

    Args:
        x: Rows (rows, d), float32.
        ids: Expert of each row, (rows,) int64.
        angles: (experts, stages, pairs): float16, float32 or int8 codes; or uint8, two 4-bit codes
            a byte.
        scales: (experts, stages) float16 of codes; empty beside floats.
        d: Width of the rows.
        inverse: Apply B^T.
    """
    if angles.dtype == torch.uint8:
        angles = unpack_nibbles(angles, num_pairs(d))
    wide = angles.float() if scales.numel() == 0 else decode_codes(angles, scales)
    return apply_butterfly(x, wide[ids], inverse)


@rotate_rows.register_fake
def _(x: Tensor, ids: Tensor, angles: Tensor, scales: Tensor, d: int, inverse: bool) -> Tensor:
    return torch.empty_like(x)
