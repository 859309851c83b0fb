"""Building the new layer of a candidate, and measuring how far it is from the original."""

import copy
import dataclasses
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import CUSTOM, ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.surgery import ReplacementPlan, find_slot
from lightning_bfmoe.swap.blocks import relative_error
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.experts import mix_experts, routing_on_probe
from lightning_bfmoe.swap.fit import expert_spread, fit_experts, weight_error
from lightning_bfmoe.swap.probe import probe_input, run_on_probe
from lightning_bfmoe.swap.quiet import plain_defaults, quiet

Layer = ButterflyMoE | ButterflyExperts
KINDS: dict[str, type[Layer]] = {
    "ButterflyMoE": ButterflyMoE,
    "ButterflyExperts": ButterflyExperts,
}


_SAME = 1e-3  # experts that differ by less than this (relative) are copies of one another


class OutputDropout:
    """Forward hook: dropout on a layer's output, as some blocks have it (GPT-2's `resid_pdrop`).

    A hook adds no key to the state_dict; a swap plan keeps `p`.

    Args:
        p: Probability.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Drops elements of `output` in training."""
        return F.dropout(output, self.p, module.training)


def build_layer(
    c: Candidate, config: ButterflyMoEConfig, fit_steps: int = 0, bias: bool | None = None
) -> tuple[Layer, float | None]:
    """Builds the layer that replaces a candidate; `init="preserve"` gives it the weights found.

    Args:
        c: A recognised candidate.
        config: Settings; the number of experts of an expert block is kept, whatever it says.
        fit_steps: Adam steps that fit distinct experts onto the shared matrix.
        bias: Whether the layer has biases; as the block when None.

    Returns:
        The layer, and for expert blocks the relative error of the experts' matrices.
    """
    block = c.block
    assert block is not None and c.placement is not None
    kind, config = plan_settings(c, config)
    with plain_defaults():
        layer = KINDS[kind].from_config(
            config,
            block.d_model,
            block.d_ff,
            d_out=block.d_out,
            gated=block.gated,
            bias=any(e.biases for e in c.experts or [block]) if bias is None else bias,
            dropout=block.dropout,
            activation=copy.deepcopy(block.activation),
            device=block.up.device,
        )
    if next(t for t in block.tensors().values()).dtype == torch.float64:
        layer.double()
    error = None
    if config.init == "preserve":
        layer.load_dense_(**block.tensors())
        if isinstance(layer, ButterflyExperts):
            if fit_steps:
                fit_experts(layer, c.experts, fit_steps)
            error = weight_error(layer, c.experts)
            if expert_spread(c.experts) > _SAME:
                _warn_of(c, error, fit_steps)
    finish_layer(layer, c.leaves, block.output_dropout)
    c.placement["layer"] = {"family": c.family, "output_dropout": block.output_dropout}
    if layer.settings["activation"] == CUSTOM:
        c.placement["layer"]["activation"] = _activation_place(c)
    return layer, error


def plan_settings(c: Candidate, config: ButterflyMoEConfig) -> tuple[str, ButterflyMoEConfig]:
    """Kind of layer for a candidate, and the config with its own seed and number of experts."""
    seed = (config.seed + zlib.crc32(c.path.encode())) % 2**31  # layers differ, runs do not
    config = dataclasses.replace(config, seed=seed)
    if not c.experts:
        return "ButterflyMoE", config
    count = len(c.experts)
    config = dataclasses.replace(config, num_experts=count, top_k=min(config.top_k, count))
    return "ButterflyExperts", config


def finish_layer(layer: nn.Module, originals: list[nn.Module], output_dropout: float) -> None:
    """Carries over what is not weights: frozen stays frozen, an output dropout stays."""
    parameters = [p for m in originals for p in m.parameters()]
    if parameters and not any(p.requires_grad for p in parameters):
        layer.requires_grad_(False)
    if output_dropout > 0:
        layer.register_forward_hook(OutputDropout(output_dropout))


def _activation_place(c: Candidate) -> dict[str, str | int]:
    """Where a rebuilt model keeps an activation that has no name, relative to the placement."""
    at = c.block.activation_at if c.block is not None else None
    if at is None:
        raise SwapError(
            "an activation without a name must stand in the model, so that a checkpoint finds it",
            got=f"block {c.path!r}",
            fix="Set FeedForward(activation_at='its.path') in the adapter, or use a registry name.",
        )
    if c.family == "expert-list":
        return {"inside": f"0.{at}"}
    return {"identity": c.identities.index(at)} if at in c.identities else {"inside": at}


def activation_from_model(
    model: nn.Module, entry: ReplacementPlan
) -> Callable[[Tensor], Tensor] | None:
    """The unnamed activation of the block that stands at a placement; None when it has a name.

    Raises:
        SwapError: It is not where the placement says.
    """
    place = entry.get("layer", {}).get("activation")
    if place is None:
        return None
    path = (
        entry["identities"][place["identity"]]
        if "identity" in place
        else f"{entry['path']}.{place['inside']}"
    )
    owner, name = find_slot(model, path)
    return copy.deepcopy(getattr(owner, name))


def measure(c: Candidate, layer: Layer) -> float | None:
    """Relative RMS error of the layer's output on random rows, in eval mode."""
    block = c.block
    assert block is not None
    with quiet(layer):
        if c.experts:
            assert isinstance(layer, ButterflyExperts)
            x = probe_input(c.experts[0], (64,), seed=1)
            chosen, weights = routing_on_probe(len(c.experts), x)
            return relative_error(
                layer(x, chosen, weights), mix_experts(c.experts, x, chosen, weights)
            )
        if c.call is None:
            x = probe_input(block, (64,), seed=1)
            return relative_error(layer(x), block(x))
        x, wanted = run_on_probe(c.module, c.call, block, seed=1)
        return relative_error(layer(x), wanted)


def _warn_of(c: Candidate, error: float, fit_steps: int) -> None:
    start = f"{fit_steps} fitting steps" if fit_steps else "taking their mean"
    warnings.warn(
        f"{c.path}: {len(c.experts)} independent experts do not fit an orbit of one matrix well: "
        f"the relative error of their weights is {error:.0%} after {start}. "
        "Train the model further, or leave this block alone with exclude=.",
        stacklevel=4,  # the caller of swap_feed_forward
    )


def block_bytes(c: Candidate) -> tuple[int, int]:
    """Numbers and bytes of a candidate's original weights, each tensor once."""
    tensors: list[Tensor] = [p for leaf in c.leaves for p in leaf.parameters()]
    if not tensors and c.block is not None:
        tensors = list(c.block.tensors().values())
    held = {id(t): t for t in tensors}.values()
    return sum(t.numel() for t in held), sum(t.numel() * t.element_size() for t in held)
