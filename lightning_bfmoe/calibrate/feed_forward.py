"""One feed-forward block in closed form: input matrices first, the output matrix after them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bfmoe.calibrate.heap import return_free_memory
from lightning_bfmoe.calibrate.matrix import MatrixChoice, Recipe, fit_matrix_, input_judge
from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.calibrate.orbit import centre_weight
from lightning_bfmoe.calibrate.refit import best_bias, choose_refit
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import CalibrationError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyLinear, ButterflyMoE


@dataclass
class Dense:
    """The trained block that a layer replaces.

    Args:
        up: (d_ff, d_model).
        down: (d_out, d_ff).
        function: The block without dropout, rows to rows.
        gate: (d_ff, d_model) when gated.
        up_bias: (d_ff,).
        gate_bias: (d_ff,).
    """

    up: Tensor
    down: Tensor
    function: Callable[[Tensor], Tensor]
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None


@dataclass
class BlockFit:
    """What calibration did to one block.

    Args:
        path: Of the block.
        tokens: Tokens that it was fitted to (count).
        held_tokens: Tokens that judged (count).
        choices: By role: up, gate, down.
        ridge: Of the refit; None when the trained output matrix was kept.
        error: Held-out E|y - f(x)|^2 over the variance of y, of the mean expert and its correction.
        by_rank: That error with a correction of rank 0, 1, ...; empty without one.
        dead_units: Hidden units that never moved (count).
    """

    path: str
    tokens: int = 0
    held_tokens: int = 0
    choices: dict[str, MatrixChoice] = field(default_factory=dict)
    ridge: float | None = None
    error: float = float("nan")
    by_rank: list[float] = field(default_factory=list)
    dead_units: int = 0


@torch.no_grad()
def fit_inputs_(
    layer: ButterflyMoE | ButterflyExperts,
    dense: Dense,
    fit: Moments,
    held: Moments,
    recipe: Recipe,
) -> dict[str, MatrixChoice]:
    r"""Set up and gate of a layer from the moments of its inputs, biases from their means.

    .. math:: b = b_{dense} + (W - \hat W)\,\bar x

    Args:
        layer: Changed in place.
        dense: The block it replaces.
        fit: Moments of the block's inputs.
        held: The same of held-out tokens.
        recipe: Settings.

    Returns:
        The choices, by role.
    """
    experts = experts_of(layer)
    choices = {}
    for role in ("up", "gate"):
        linear, weight = getattr(experts, role), getattr(dense, role)
        if linear is None or weight is None:
            continue
        judge = input_judge(weight, fit, held, linear.bias is not None)
        choices[role], found = fit_matrix_(linear, weight, fit, judge, recipe)
        if linear.bias is not None:
            trained = getattr(dense, f"{role}_bias")
            miss = (weight.double() - found) @ fit.mean
            linear.bias.copy_(miss if trained is None else trained.double() + miss)
    return choices


@torch.no_grad()
def fit_output_(
    layer: ButterflyMoE | ButterflyExperts,
    dense: Dense,
    fit: Moments,
    held: Moments,
    recipe: Recipe,
) -> tuple[MatrixChoice, float | None]:
    """Set down of a layer from moments of the hidden units that up and gate now give.

    Args:
        layer: Changed in place; up and gate are set.
        dense: The block it replaces.
        fit: Moments of `degraded_hidden` with the block's outputs as targets; what stands behind
            the hidden units is not looked at.
        held: The same of held-out tokens.
        recipe: Settings.

    Returns:
        The choice, and the ridge of the refit (None when the trained matrix was kept).
    """
    down = experts_of(layer).down
    fit, held = (m.head(dense.down.shape[1]) for m in (fit, held))
    has_bias = down.bias is not None
    wanted, ridge = dense.down.double(), None
    if recipe.refit:
        wanted, ridge = choose_refit(wanted, fit, held)
        return_free_memory()

    def bias(matrix: Tensor) -> Tensor:
        return best_bias(matrix, fit) if has_bias else torch.zeros_like(fit.target_mean)

    def judge(matrix: Tensor) -> float:
        return held.output_error(matrix, bias(matrix))

    if isinstance(down, ButterflyLinear):
        choice, found = fit_matrix_(down, wanted, fit, judge, recipe)
    else:
        down.weight.copy_(wanted)
        found, error = wanted, judge(wanted)
        choice = MatrixChoice("dense", False, error, {"dense": error})
    if down.bias is not None:
        down.bias.copy_(bias(found))
    return choice, ridge


def degraded_hidden(layer: ButterflyMoE | ButterflyExperts) -> Callable[[Tensor], Tensor]:
    """The hidden units of a layer's mean expert, as a function of rows.

    The dense matrices are formed once, when this is called, in the dtype of the layer's parameters.
    """
    experts = experts_of(layer)
    up, up_bias = centre_weight(experts.up), experts.up.bias
    act = experts.activation
    if experts.gate is None:
        return lambda x: act(F.linear(x.to(up.dtype), up, up_bias))
    gate, gate_bias = centre_weight(experts.gate), experts.gate.bias

    def hidden(x: Tensor) -> Tensor:
        x = x.to(up.dtype)
        return act(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)

    return hidden


def experts_of(layer: ButterflyMoE | ButterflyExperts) -> ButterflyExperts:
    """The experts of a layer, which may be the layer."""
    return layer.experts if isinstance(layer, ButterflyMoE) else layer


def check_settings(config: ButterflyMoEConfig) -> None:
    """Raise unless layers with these settings can be calibrated.

    Raises:
        CalibrationError: The ternary scale is absmean, or the weights found shall not be kept.
    """
    if config.scale_or_default != "lstsq":
        raise CalibrationError(
            "a calibrated layer has scale='lstsq', which leaves a ternary matrix as it is",
            got=f"scale={config.scale!r}",
            fix="Use scale='lstsq' (the default); absmean would shrink the grid by its density.",
        )
    if config.init != "preserve":
        raise CalibrationError(
            "a calibration starts from the weights that a model has",
            got=f"init={config.init!r}",
            fix="Use init='preserve' (the default), or swap_feed_forward without data.",
        )
