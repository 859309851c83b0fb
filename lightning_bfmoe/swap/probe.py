r"""Proof by forward pass: which feed-forward formula does a block really compute?

Names say little (`w1` is the gate in one model and the up matrix in another), so every reading of
the shapes is evaluated on random inputs and must reproduce the block's own output. What passes is
known, not guessed; what does not is refused with the reason.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.layers.activation import ACTIVATIONS
from lightning_bfmoe.swap.activations import Activation, own_activations
from lightning_bfmoe.swap.blocks import (
    FeedForward,
    NotFeedForwardError,
    UnreadableError,
    relative_error,
    tolerance,
)
from lightning_bfmoe.swap.dropout import find_dropout
from lightning_bfmoe.swap.linears import is_linear, linear_weight, unreadable
from lightning_bfmoe.swap.quiet import quiet

_SHAPES = ((2, 5), (7,))  # leading axes of the probe inputs that are tried, in this order
_AMPLITUDE = 1.5  # RMS of the pre-activations: large enough to tell gelu from its tanh form


def probe_block(block: nn.Module, seed: int = 0) -> FeedForward:
    """Finds the formula that reproduces `block`, among all roles of its matrices and activations.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8), nn.Dropout(0.1))
        >>> found = probe_block(net)
        >>> found.activation, found.gated, found.dropout, found.output_dropout
        ('silu', False, 0.0, 0.1)

    Args:
        block: A module with two or three matrices below it.
        seed: Of the probe inputs.

    Returns:
        The block's matrices (views, nothing is copied), activation and dropout.

    Raises:
        NotFeedForwardError: No reading reproduces the block.
        UnreadableError: Weights are meta, sharded, not finite or not floating point.
    """
    leaves = {name: module for name, module in block.named_modules() if is_linear(module)}
    named = {name: p for name, p in block.named_parameters() if name.rpartition(".")[0] in leaves}
    if problem := unreadable(named):
        if not _has_numbers(named):
            raise NotFeedForwardError(problem)
        with quiet(block), _random_weights(leaves, seed):  # is it a feed-forward block at all?
            _find(block, leaves, seed)
        raise UnreadableError(problem)
    return _find(block, leaves, seed)


def _has_numbers(tensors: Mapping[str, Tensor]) -> bool:
    lazy = nn.parameter.UninitializedParameter
    return all(not isinstance(t, lazy) and t.is_floating_point() for t in tensors.values())


def _find(block: nn.Module, leaves: dict[str, nn.Module], seed: int) -> FeedForward:
    matrices = {name: linear_weight(module) for name, module in leaves.items()}
    reasons = []
    for d_model in dict.fromkeys(parts.d_model for parts in read_shapes(matrices)):
        try:
            return _find_formula(block, leaves, d_model, seed)
        except NotFeedForwardError as error:
            reasons.append(error)
    raise reasons[0] if reasons else NotFeedForwardError(describe_shapes(matrices))


Matrices = dict[str, tuple[Tensor, Tensor | None]]  # weight [out, in] and bias, by name


def read_shapes(matrices: Matrices) -> Iterator[FeedForward]:
    """All ways in which two or three matrices chain as d_model -> d_ff -> d_out.

    Two matrices may also be a gated block whose first holds gate and up stacked (`2 * d_ff` rows).

    Args:
        matrices: Weight in ``[out, in]`` order and bias, by name.

    Yields:
        The block, its activation not yet known.
    """
    if len(matrices) not in (2, 3):
        return
    for names in itertools.permutations(matrices):
        (up, up_bias), *middle, (down, down_bias) = [matrices[name] for name in names]
        if min(up.shape[1], *down.shape) < 2:
            continue
        end: dict[str, Any] = {"down": down, "down_bias": down_bias}
        chains = down.shape[1] == up.shape[0]
        if middle and chains and middle[0][0].shape == up.shape:
            gate, gate_bias = middle[0]
            yield FeedForward(up=up, gate=gate, up_bias=up_bias, gate_bias=gate_bias, **end)
        elif not middle and chains:
            yield FeedForward(up=up, up_bias=up_bias, **end)
        elif not middle and 2 * down.shape[1] == up.shape[0]:
            halves = up.chunk(2)
            biases = (None, None) if up_bias is None else up_bias.chunk(2)
            for g, u in ((0, 1), (1, 0)):
                yield FeedForward(
                    up=halves[u], gate=halves[g], up_bias=biases[u], gate_bias=biases[g], **end
                )


def _find_formula(
    block: nn.Module, leaves: dict[str, nn.Module], d_model: int, seed: int
) -> FeedForward:
    own = [
        (act, None if isinstance(act, str) else at) for at, act in own_activations(block).items()
    ]
    known: list[tuple[Activation, str | None]] = [(name, None) for name in ACTIVATIONS]
    nearest = (math.inf, "")
    for choices in (list(dict.fromkeys(own)), known):
        trials = _trials(leaves, d_model, choices)
        if not trials:
            continue
        errors, x, wanted = _errors(block, trials, seed)
        passed = [i for i, error in enumerate(errors) if error <= tolerance(wanted.dtype)]
        if len(passed) > 1:  # e.g. weights of zero: any activation fits, so ask random weights
            with quiet(block), _random_weights(leaves, seed):
                again = _errors(block, _trials(leaves, d_model, choices), seed)[0]
            passed.sort(key=lambda i: again[i])
        if passed:
            return find_dropout(block, trials[passed[0]], x, wanted)
        best = min(range(len(trials)), key=lambda i: errors[i])
        act = trials[best].activation
        nearest = min(
            nearest, (errors[best], act if isinstance(act, str) else "its own activation")
        )
    raise NotFeedForwardError(
        "neither down(act(up(x))) nor down(act(gate(x)) * up(x)) gives its output; "
        f"the nearest, with {nearest[1]}, is off by {nearest[0]:.1%}"
    )


def _trials(
    leaves: dict[str, nn.Module], d_model: int, choices: list[tuple[Activation, str | None]]
) -> list[FeedForward]:
    matrices = {name: linear_weight(module) for name, module in leaves.items()}
    return [
        replace(parts, activation=act, activation_at=at)
        for parts in read_shapes(matrices)
        if parts.d_model == d_model
        for act, at in choices
    ]


def _errors(
    block: nn.Module, trials: list[FeedForward], seed: int
) -> tuple[list[float], Tensor, Tensor]:
    x, wanted = run_on_probe(block, block.forward, trials[0], seed)
    with quiet(block):
        return [relative_error(trial(x), wanted) for trial in trials], x, wanted


@contextlib.contextmanager
def _random_weights(leaves: dict[str, nn.Module], seed: int) -> Iterator[None]:
    """Other weights of the same shapes, for as long as the context lasts."""
    generator = torch.Generator().manual_seed(seed + 1)
    saved = [(leaf, dict(leaf._parameters)) for leaf in leaves.values()]
    for leaf, parameters in saved:
        for name, p in parameters.items():
            if p is not None:
                drawn = torch.randn(p.shape, generator=generator, device="cpu")
                drawn = drawn / max(p.shape[-1], 2) ** 0.5
                readable = not p.is_meta and type(p) is nn.Parameter
                leaf._parameters[name] = nn.Parameter(
                    drawn.to(p.device if readable else "cpu", p.dtype)
                )
    try:
        yield
    finally:
        for leaf, parameters in saved:
            leaf._parameters.update(parameters)


def probe_input(parts: FeedForward, shape: tuple[int, ...], seed: int) -> Tensor:
    """Gaussian rows, scaled so that the pre-activations have an RMS of 1.5; own generator."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, parts.d_model, generator=generator, device="cpu")
    x = x.to(parts.up.device, parts.up.dtype)
    rms = (x @ (parts.up if parts.gate is None else parts.gate).t()).float().square().mean().sqrt()
    return x * float((_AMPLITUDE / rms).clamp(max=1e3))


def run_on_probe(
    block: nn.Module, call: Callable[[Tensor], Any], parts: FeedForward, seed: int
) -> tuple[Tensor, Tensor]:
    """Calls a block in eval mode on probe inputs of three axes, or of two when it refuses those.

    Returns:
        The input and the output.

    Raises:
        NotFeedForwardError: The call raises, or returns something else than one row per row.
    """
    problem: Exception | None = None
    for shape in _SHAPES:
        x = probe_input(parts, shape, seed)
        with quiet(block):
            try:
                y = call(x.clone())
            except Exception as error:  # a foreign forward may raise anything
                problem = problem or error
                continue
        if not isinstance(y, Tensor):
            raise NotFeedForwardError(f"its forward returns a {type(y).__name__}, not one tensor")
        if y.shape != x.shape[:-1] + (parts.d_out,):
            raise NotFeedForwardError(f"it maps shape {list(x.shape)} to {list(y.shape)}")
        return x, y.detach()
    text = str(problem).strip().split("\n")[0][:160]
    raise NotFeedForwardError(f"calling it with one tensor raises {type(problem).__name__}: {text}")


def describe_shapes(matrices: Matrices) -> str:
    """Why matrices do not chain, for messages."""
    shapes = {name: weight.shape for name, (weight, _) in matrices.items()}
    return "its shapes do not chain d -> f -> d: " + ", ".join(
        f"{name or 'itself'} {s[1]} -> {s[0]}" for name, s in shapes.items()
    )
