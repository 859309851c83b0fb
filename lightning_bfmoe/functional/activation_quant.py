"""Activation quantisation: each row becomes integers times one scale, straight through.

The rotations of a layer act on its activations, so they can only show their worth against outliers
when the activations that enter the ternary matrix are quantised too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.ternary import StraightThrough

_TINY = 1e-30  # keeps an all-zero row zero instead of NaN


def round_rows(x: Float[Tensor, "*rows d"], bits: int) -> Float[Tensor, "*rows d"]:
    r"""The nearest row on the absmax grid of `bits` bits; no gradient.

    .. math:: s = \frac{\max_j |x_j|}{2^{b-1} - 1} ,\qquad Q(x)_j = s\,\mathrm{round}(x_j / s)

    Symmetric: zero and the row's largest magnitude are on the grid, and no number is clipped.

    Example:
        >>> round_rows(torch.tensor([[7.0, 2.4, 0.0, -3.6]]), bits=4).tolist()
        [[7.0, 2.0, 0.0, -4.0]]

    Args:
        x: Rows of any floating dtype; the grid is formed in float32, or in float64 for double.
        bits: Width of the integers (bits, 2 to 16).

    Returns:
        Same shape and dtype. A row with NaN or infinite numbers becomes NaN.

    Raises:
        ConfigError: `bits` is out of range.

    Source: per-token absmax as in BitNet b1.58 (arXiv 2402.17764); symmetric at every width, ours.
    """
    check_bits(bits)
    wide = x.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    levels = 2 ** (bits - 1) - 1
    step = wide.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY) / levels  # (..., 1)
    rounded: Tensor = (wide / step).round() * step
    return rounded.to(x.dtype)


def quantize_activations(
    x: Float[Tensor, "*rows d"], bits: int, blend: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, "*rows d"]:
    r"""Fake-quantised rows with a straight-through gradient, blended in by lambda.

    .. math:: x + \lambda\,(Q(x) - x)\texttt{.detach()} ,\qquad \partial / \partial x = 1

    At lambda = 1 the value is exactly Q(x); at lambda = 0 it is x, so that a swap with activation
    quantisation preserves the function too.

    Example:
        >>> x = torch.tensor([[1.0, 0.4]], requires_grad=True)
        >>> quantize_activations(x, bits=2).sum().backward()
        >>> x.grad.tolist()
        [[1.0, 1.0]]

    Args:
        x: Rows of any floating dtype.
        bits: Width of the integers (bits, 2 to 16); 8 costs next to nothing, 4 needs the rotation.
        blend: Lambda in [0, 1]; a 0-d tensor changes without a recompilation.

    Returns:
        Same shape and dtype.

    Raises:
        ConfigError: `bits` is out of range.

    Source: straight-through BitNet b1.58 (arXiv 2402.17764); the blend on activations from the
    1.58-bit fine-tuning recipe of Hugging Face.
    """
    blend = torch.as_tensor(blend, device=x.device)
    mixed: Tensor = StraightThrough.apply(x, round_rows(x, bits), blend)
    return mixed


def check_bits(bits: object) -> None:
    """Raise unless `bits` is a width that `round_rows` knows.

    Raises:
        ConfigError: Not an integer from 2 to 16.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise ConfigError(
            "activations are quantised to an integer number of bits from 2 to 16",
            got=repr(bits),
            fix="Use 8 or 4, or None for no quantisation.",
        )
