"""`swap_feed_forward`: find, choose, build, measure, and only then exchange."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import BFMoEError, ConfigError, SwapError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.bypass import LinearBypass
from lightning_bfmoe.layers.experts import experts_arguments
from lightning_bfmoe.layers.surgery import Replaced, ReplacementPlan, apply_replacement
from lightning_bfmoe.swap.activations import activation_name
from lightning_bfmoe.swap.build import block_bytes, build_layer, measure, plan_settings
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.find import find_feed_forward
from lightning_bfmoe.swap.losses import warn_of_losses
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.report import SwappedBlock, SwapReport, layer_sizes, skipped_rows
from lightning_bfmoe.swap.select import Patterns, select_candidates

Layer = ButterflyMoE | ButterflyExperts | LinearBypass
_ELSEWHERE = dict.fromkeys(("budget", "sparsity", "options"), "selected_swap")
_ELSEWHERE |= dict.fromkeys(("calibration", "width", "loss_fn"), "calibrated_swap")


@torch.inference_mode(False)  # inference tensors could not be trained
def swap_feed_forward(
    model: nn.Module,
    config: ButterflyMoEConfig | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    dry_run: bool = False,
    fit_steps: int = 0,
    **overrides: Any,
) -> SwapReport:
    """Exchanges the feed-forward blocks of a model for ButterflyMoE layers, in place.

    With ``init="preserve"`` (the default) the weights found are kept: at lambda 0 and angle_std 0
    the model computes what it computed before. Training flag, device, frozen weights, dropout and
    shared modules are kept, and no global random number is drawn. If one block fails, nothing is
    changed. Layers that were swapped before are left alone, so a second call does nothing.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 32))
        >>> report = swap_feed_forward(model, num_experts=4)
        >>> [(b.path, b.d_ff, b.num_experts) for b in report.blocks]
        [('1.linear1', 32, 4)]

    Args:
        model: Any module; HF, timm, torch or your own.
        config: Settings of the layers.
        include: Paths or patterns of the blocks to swap, see `select_candidates`; all when None.
        exclude: Paths or patterns to leave alone.
        dry_run: Only report what would be swapped and what it would save.
        fit_steps: Adam steps that fit the distinct experts of a mixture-of-experts model onto one
            matrix (count); 0 takes their mean.
        **overrides: Fields of `ButterflyMoEConfig` that differ from `config`.

    Returns:
        The report: a table when printed, the key to `restore`, and a plan for checkpoints.

    Raises:
        SwapError: Nothing matches, or a chosen block cannot be swapped.
        ConfigError: A setting is out of range or unknown.
    """
    for name in _ELSEWHERE.keys() & set(overrides):
        raise ConfigError(
            "a swap that looks at data is a function of its own",
            got=f"swap_feed_forward({name}=...)",
            fix=f"Call lightning_bfmoe.{_ELSEWHERE[name]}(model, data, {name}=...).",
        )
    config = ButterflyMoEConfig.from_dict(
        {**(config or ButterflyMoEConfig()).to_dict(), **overrides}
    )
    if not isinstance(fit_steps, int) or fit_steps < 0:
        raise SwapError("fit_steps must be an integer >= 0", got=fit_steps, fix="Use fit_steps=0.")
    with keep_rng():
        candidates = find_feed_forward(model)
        chosen = select_candidates(model, candidates, include, exclude)
        left = skipped_rows(c for c in candidates if not any(c is taken for taken in chosen))
        blocks = [describe_block(c, config) for c in chosen]
        if dry_run:
            return SwapReport(blocks, left, dry_run=True)
        entries: list[tuple[ReplacementPlan, Layer]] = []
        for c, block in zip(chosen, blocks, strict=True):
            try:
                layer, block.expert_error = build_layer(c, config, fit_steps)
                block.relative_error = measure(c, layer)
            except BFMoEError as error:
                raise SwapError(
                    "every chosen block must become a ButterflyMoE layer; nothing was changed",
                    got=f"block {c.path!r} ({c.shape}): {error}",
                    fix=f"Change the settings, or leave it alone with exclude={c.path!r}.",
                ) from error
            assert c.placement is not None
            entries.append((c.placement, layer))
            warn_of_losses(c)
        receipts = install(model, entries)
    return SwapReport(
        blocks, left, placements=[plan_entry(layer) for layer, _ in receipts], receipts=receipts
    )


def install(
    model: nn.Module, entries: Sequence[tuple[ReplacementPlan, Layer]]
) -> list[tuple[Any, Replaced]]:
    """Puts all layers into their slots, or, if one does not fit, none.

    Args:
        model: The root that the placements start from.
        entries: Placement and layer.

    Returns:
        Each layer with the receipt that `restore` needs.

    Raises:
        SwapError: A slot does not exist.
    """
    done: list[tuple[Any, Replaced]] = []
    try:
        for entry, layer in entries:
            done.append((layer, apply_replacement(model, entry, layer)))
    except BaseException:
        for _, receipt in reversed(done):
            receipt.revert()
        raise
    return done


def plan_entry(layer: Layer) -> ReplacementPlan:
    """The placement of a swapped layer together with all that rebuilds it, as plain data."""
    assert layer.placement is not None
    extra = {"kind": type(layer).__name__, "settings": dict(layer.settings)}
    return {**layer.placement, "layer": {**layer.placement.get("layer", {}), **extra}}  # type: ignore[typeddict-item,return-value]


def describe_block(
    c: Candidate, config: ButterflyMoEConfig, bias: bool | None = None
) -> SwappedBlock:
    """The report's row of a candidate, as it will be.

    Args:
        c: A recognised candidate.
        config: Settings of the layers.
        bias: Whether the layer has biases; as the block when None.
    """
    block = c.block
    assert block is not None and c.placement is not None
    kind, config = plan_settings(c, config)
    dense = {
        "d_model": block.d_model,
        "d_ff": block.d_ff,
        "d_out": block.d_out,
        "gated": block.gated,
        "bias": any(e.biases for e in c.experts or [block]) if bias is None else bias,
        "num_experts": config.num_experts,
    }
    name = (
        block.activation if isinstance(block.activation, str) else activation_name(block.activation)
    )
    settings = experts_arguments(config, {**dense, "activation": name or "custom"})
    settings["correction_rank"] = config.correction_rank
    parameters, packed = layer_sizes(settings, router=kind == "ButterflyMoE")
    before, size = block_bytes(c)
    return SwappedBlock(
        path=c.path,
        owner=c.owner,
        family=c.family,
        d_model=block.d_model,
        d_ff=block.d_ff,
        d_out=block.d_out,
        gated=block.gated,
        activation=settings["activation"],
        num_experts=config.num_experts,
        places=1 + len(c.placement["aliases"]),
        own_router=bool(c.experts),
        parameters_before=before,
        bytes_before=size,
        parameters_after=parameters,
        packed_bytes=packed,
    )
