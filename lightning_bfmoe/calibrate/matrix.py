"""One matrix of a layer: try the bases, keep the one that does best on held-out moments."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bfmoe.calibrate.descend import descend_trits
from lightning_bfmoe.calibrate.equalize import column_equalizer
from lightning_bfmoe.calibrate.gptq import gptq_ternary
from lightning_bfmoe.calibrate.heap import return_free_memory
from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.calibrate.orbit import (
    BASES,
    base_angles,
    into_basis,
    moment_in_basis,
    out_of_basis,
    place_orbit_,
)
from lightning_bfmoe.layers import ButterflyLinear


@dataclass(frozen=True)
class Recipe:
    """Settings of the closed forms.

    Args:
        bases: Names in `orbit.BASES` that are tried.
        damping: Share of the mean diagonal added to second moments in GPTQ.
        sweeps: Passes of coordinate descent after it (count); 0 for none.
        noise: Largest standard deviation of the experts' angles around the base (radians).
        refit: Refit the output matrix on the degraded hidden units.
    """

    bases: tuple[str, ...] = ("identity", "hadamard")
    damping: float = 0.01
    sweeps: int = 4
    noise: float = 0.01
    refit: bool = True


@dataclass
class MatrixChoice:
    """What was chosen for one matrix.

    Args:
        basis: Name of the input rotation.
        equalized: Whether the columns were equalised (needs gains).
        error: Held-out relative error of the matrix's output (of the block's output for `down`).
        tried: That error of every candidate.
    """

    basis: str
    equalized: bool
    error: float
    tried: dict[str, float]


@torch.no_grad()
def fit_matrix_(
    linear: ButterflyLinear,
    weight: Tensor,
    moments: Moments,
    judge: Callable[[Tensor], float],
    recipe: Recipe,
) -> tuple[MatrixChoice, Tensor]:
    r"""Write the ternary matrix and base angles that come nearest to `weight`; biases stay.

    Each candidate is W = (alpha T) B^T diag(c), with T found by GPTQ and coordinate descent under
    the moments of B^T (c * x): centred ones when the layer has a bias, which then takes the mean.
    The latents become alpha T, which least squares leaves as it is.

    Args:
        linear: Changed in place.
        weight: The dense matrix to come near to, (d_out, d_in).
        moments: Of its inputs.
        judge: Held-out error of a dense matrix.
        recipe: Settings.

    Returns:
        The choice, and the dense matrix of the mean expert, (d_out, d_in) in double.
    """
    weight = weight.detach().double()
    second = moments.covariance() if linear.bias is not None else moments.second()
    best: tuple[float, Tensor, Tensor, Tensor, str, bool] | None = None
    tried = {}
    equalizers = (False, True) if linear.gain_in is not None else (False,)
    for basis, equalized in itertools.product(recipe.bases, equalizers):
        c = column_equalizer(weight) if equalized else torch.ones_like(weight[0])
        angles = base_angles(linear.rotate_in, BASES[basis])
        flat = into_basis(weight / c, angles)
        scaled = c.unsqueeze(1) * second * c if equalized else second
        rotated = moment_in_basis(scaled, angles)
        del scaled
        trits, alpha = gptq_ternary(
            flat, rotated, damping=recipe.damping, granularity=linear.substrate.granularity
        )
        if recipe.sweeps:
            trits, alpha = descend_trits(
                flat, trits, alpha, rotated, sweeps=recipe.sweeps, damping=recipe.damping
            )
        grid = alpha * trits
        dense = out_of_basis(grid, angles) * c
        error = judge(dense)
        tried[basis + (", equalised" if equalized else "")] = error
        if best is None or error < best[0]:
            best = (error, grid, dense, c, basis, equalized)
        del rotated, flat, trits, alpha
        return_free_memory()
    assert best is not None
    error, grid, dense, c, basis, equalized = best
    noise = min(recipe.noise, _spread(linear))
    place_orbit_(linear.rotate_in, BASES[basis], noise)
    place_orbit_(linear.rotate_out, 0.0, noise)
    linear.substrate.latent.copy_(grid)  # type: ignore[union-attr,operator]
    if linear.gain_in is not None and linear.gain_out is not None:
        linear.gain_in.copy_(c.expand_as(linear.gain_in))
        linear.gain_out.fill_(1.0)
    return MatrixChoice(basis, equalized, error, tried), dense


def _spread(linear: ButterflyLinear) -> float:
    """Standard deviation of the experts' input angles around their mean (radians)."""
    angles = linear.rotate_in.angles.double()
    return float((angles - angles.mean(dim=0, keepdim=True)).square().mean().sqrt())


def input_judge(weight: Tensor, fit: Moments, held: Moments, bias: bool) -> Callable:
    r"""Held-out relative error of a matrix's output: E|(W - Q) x - b|^2 / E|W x|^2.

    The bias b takes the mean error over the tokens that were fitted to, when there is a bias.

    Args:
        weight: W, (d_out, d_in).
        fit: Moments of the inputs that b is taken from.
        held: Moments of other inputs.
        bias: Whether the layer has a bias.

    Returns:
        A function of Q.
    """
    w = weight.detach().double()
    second = held.second()
    norm = float(((w @ second) * w).sum().clamp(min=1e-300))

    def judge(dense: Tensor) -> float:
        miss = w - dense
        error = ((miss @ second) * miss).sum()
        if bias:
            b = miss @ fit.mean
            error = error - 2 * (miss @ held.mean) @ b + b.square().sum()
        return float(error.clamp(min=0)) / norm

    return judge
