r"""Ternary quantisation: a matrix becomes a scale per row times trits in {-1, 0, +1}.

Two scales: ``absmean`` (BitNet b1.58) and ``lstsq``, the exact least-squares solution per row. The
second is the better start and, unlike absmean, leaves a row that is already ternary as it is.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lightning_bfmoe.errors import ConfigError, ShapeError

ABSMEAN_FLOOR = 1e-5  # the least absmean scale, as in BitNet b1.58


def ternarize(
    weight: Float[Tensor, "d_out d_in"], scale: str = "lstsq", granularity: str = "row"
) -> tuple[Int8[Tensor, "d_out d_in"], Float[Tensor, "rows one"]]:
    r"""The nearest ternary matrix: trits T and scales alpha with alpha * T close to W.

    ``lstsq`` solves min over alpha, T of the squared error exactly. T keeps the k largest
    magnitudes of a row and alpha is their mean, with

    .. math:: k = \arg\max_k \frac{1}{k}\Big(\sum_{i \le k} |w|_{(i)}\Big)^2 ,\qquad
       \alpha = \frac{1}{k}\sum_{i \le k} |w|_{(i)} .

    ``absmean`` takes alpha = mean|w| and T = clip(round(w / alpha), -1, 1).

    Example:
        >>> trits, alpha = ternarize(torch.tensor([[2.0, -2.0, 0.1, 0.0]]))
        >>> trits.tolist(), alpha.tolist()
        ([[1, -1, 0, 0]], [[2.0]])

    Args:
        weight: Latent weights.
        scale: ``lstsq`` or ``absmean``.
        granularity: ``row`` (alpha is d_out x 1) or ``tensor`` (alpha is 1 x 1).

    Returns:
        Trits and scales (float32, or float64 for double weights).

    Raises:
        ConfigError: Unknown `scale` or `granularity`.
        ShapeError: The weight is empty.

    NaN or infinite weights give NaN scales, so they stay visible in every product; `check_finite`
    names them where weights enter or leave (swap, pack).

    Source: absmean arXiv 2402.17764, eq. 1-3; lstsq ours (the row-wise optimum).
    """
    if granularity not in ("row", "tensor"):
        raise ConfigError(
            "granularity must be 'row' or 'tensor'", got=repr(granularity), fix="Use 'row'."
        )
    if weight.numel() == 0:
        raise ShapeError(
            "a ternary matrix has at least one number", got=f"shape {tuple(weight.shape)}"
        )
    work = weight.detach()
    work = work if work.dtype == torch.float64 else work.float()
    rows = work if granularity == "row" else work.reshape(1, -1)
    if scale == "lstsq":
        alpha, threshold = _least_squares(rows.abs())
        trits = torch.where(rows.abs() >= threshold, rows.sign(), torch.zeros_like(rows))
    elif scale == "absmean":
        alpha = absmean_scale(rows)  # (rows, 1)
        trits = (rows / alpha).round().clamp(-1, 1)
    else:
        raise ConfigError("scale must be 'lstsq' or 'absmean'", got=repr(scale), fix="Use 'lstsq'.")
    return trits.reshape(weight.shape).to(torch.int8), alpha


def absmean_scale(rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows one"]:
    """The scale mean|w| of each row, with BitNet's floor."""
    return rows.abs().mean(dim=1, keepdim=True).clamp(min=ABSMEAN_FLOOR)


def _least_squares(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and smallest magnitude that is kept, each (rows, 1)."""
    ordered = _descending(magnitude)  # (rows, n)
    count = torch.arange(1, ordered.shape[1] + 1, device=ordered.device, dtype=ordered.dtype)
    total = ordered.cumsum(dim=1)  # (rows, n)
    best = (total.square() / count).argmax(dim=1, keepdim=True)  # (rows, 1), k - 1
    alpha = total.gather(1, best) / count[best]
    return alpha, ordered.gather(1, best)


def _descending(rows: Tensor) -> Tensor:
    """Each row sorted, largest first."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows.sort(dim=1, descending=True).values
    values = rows.clone().numpy()  # same result; NumPy's sort is several times faster than torch's
    values.sort(axis=1)
    return torch.from_numpy(values).flip(1)


def check_finite(weight: Tensor, name: str) -> None:
    """Raise unless all numbers are finite.

    Raises:
        ShapeError: Names the tensor and counts what is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ShapeError(
            f"{name} must hold finite numbers",
            got=f"{int((~torch.isfinite(weight)).sum())} NaN or infinite of {weight.numel()}",
            fix="Check the weights that were loaded; in training clip gradients or lower the rate.",
        )


def dequantize_ternary(
    trits: Int8[Tensor, "d_out d_in"],
    alpha: Float[Tensor, "rows one"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "d_out d_in"]:
    """The matrix alpha * T in `dtype`; the product is formed in alpha's dtype and rounded once."""
    return (alpha * trits.to(alpha.dtype)).to(dtype)


def quantize_ternary(
    weight: Float[Tensor, "d_out d_in"],
    blend: Float[Tensor, ""] | float = 1.0,
    scale: str = "lstsq",
    granularity: str = "row",
) -> Float[Tensor, "d_out d_in"]:
    r"""Fake-quantised weight with a straight-through gradient, blended in by lambda.

    .. math:: w + \lambda\,(\alpha T - w)\texttt{.detach()} ,\qquad \partial / \partial w = 1

    At lambda = 1 the value is exactly alpha * T, bit for bit what a packed layer computes with.

    Example:
        >>> w = torch.tensor([[1.0, -0.9, 0.05]], requires_grad=True)
        >>> quantize_ternary(w).sum().backward()
        >>> w.grad.tolist()
        [[1.0, 1.0, 1.0]]

    Args:
        weight: Latent weights.
        blend: Lambda in [0, 1]; a 0-d tensor changes without a recompilation.
        scale: See `ternarize`.
        granularity: See `ternarize`.

    Returns:
        The blended weight, same shape and dtype.

    Source: straight-through BitNet b1.58 (arXiv 2402.17764); blend from the 1.58-bit fine-tuning
    recipe of Hugging Face; the combination ours.
    """
    trits, alpha = ternarize(weight, scale, granularity)
    target = dequantize_ternary(trits, alpha, weight.dtype)
    mixed: Tensor = StraightThrough.apply(
        weight, target, torch.as_tensor(blend, device=weight.device)
    )
    return mixed


class StraightThrough(torch.autograd.Function):
    """Value lerp(w, target, lambda), exactly the target at lambda 1; gradient passes to w."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, target: Tensor, blend: Tensor) -> Tensor:
        mixed = weight + blend.to(weight.dtype) * (target - weight)
        return torch.where(blend >= 1, target, mixed)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
