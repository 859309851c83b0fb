"""Dropping experts of a layer in place: everything that has a row per expert follows."""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.packing import packed_size
from lightning_bfmoe.layers.coded import CodedNumbers
from lightning_bfmoe.layers.correction import correction_bytes
from lightning_bfmoe.layers.linear import ButterflyLinear
from lightning_bfmoe.layers.moe import ButterflyMoE
from lightning_bfmoe.layers.substrate import PackedSubstrate


@torch.no_grad()
def keep_experts_(layer: ButterflyMoE, kept: Sequence[int]) -> ButterflyMoE:
    """Keep some experts of a layer, in the given order, bit for bit; drop all others.

    Angles, gains, router rows and balance bias follow, and so do the settings that a checkpoint or
    a packed file is rebuilt from. The shared matrices stay. Parameters that shrink are new objects:
    build optimizers afterwards.

    Example:
        >>> layer = keep_experts_(ButterflyMoE(8, 16, num_experts=4, top_k=2), [3, 1])
        >>> layer.experts.up.rotate_in.angles.shape[0], layer.settings["num_experts"]
        (2, 2)

    Args:
        layer: Changed in place.
        kept: Experts, at least top_k, each once.

    Returns:
        The layer.

    Raises:
        ConfigError: An expert that is not there or named twice, too few, or a packed layer.
    """
    router, experts = layer.router, layer.experts
    kept = [int(i) for i in kept]
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(router.num_experts)):
        raise ConfigError(
            f"kept experts are different ones of 0 to {router.num_experts - 1}",
            got=kept,
            fix="Name each expert once.",
        )
    if len(kept) < router.top_k:
        raise ConfigError(
            f"a layer keeps at least top_k={router.top_k} experts",
            got=f"{len(kept)} kept",
            fix="Keep more, or train with a smaller top_k.",
        )
    _check_trained(layer)
    rows = torch.tensor(kept, device=router.weight.device)
    for owner, name in _per_expert(layer):
        old = getattr(owner, name)
        if isinstance(old, nn.Parameter):
            setattr(owner, name, nn.Parameter(old.detach()[rows].clone(), old.requires_grad))
        else:
            setattr(owner, name, old[rows].clone())
    for module in layer.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = len(kept)  # type: ignore[assignment]
    router._pending_load = router._pending_load[rows].clone()
    layer.settings = {**layer.settings, "num_experts": len(kept)}
    experts.settings = {**experts.settings, "num_experts": len(kept)}
    layer.last_routing = None
    return layer


def _per_expert(layer: ButterflyMoE) -> list[tuple[nn.Module, str]]:
    """Every tensor of a layer with a row per expert: its owner and name."""
    found: list[tuple[nn.Module, str]] = [
        (layer.router, "weight"),
        (layer.router, "balance_bias"),
    ]
    for linear in layer.experts.linears().values():
        found += [(linear.rotate_in, "angles"), (linear.rotate_out, "angles")]
        found += [(linear, n) for n in ("gain_in", "gain_out") if getattr(linear, n) is not None]
    return found


def _check_trained(layer: ButterflyMoE) -> None:
    packed = [m for m in layer.modules() if isinstance(m, PackedSubstrate | CodedNumbers)]
    if packed:
        raise ConfigError(
            "experts are dropped from a layer as it is trained",
            got=f"a packed one ({type(packed[0]).__name__})",
            fix="Prune the trained model, then pack it.",
        )


def packed_bytes(layer: ButterflyMoE, num_experts: int) -> int:
    """Bytes of a layer when packed with so many of its experts.

    Trits at 1.6 bit; angles, gains and a correction's factors fp16; the rest fp32.

    Example:
        >>> layer = ButterflyMoE(16, 64, num_experts=4)
        >>> packed_bytes(layer, 4) > packed_bytes(layer, 2)
        True
    """
    each, total = 4 * (layer.d_model + 1), 0  # a row of the router and a balance bias
    experts = layer.experts
    for linear in experts.linears().values():
        gains = [] if linear.gain_in is None else [linear.gain_in, linear.gain_out]
        rows = [linear.rotate_in.angles, linear.rotate_out.angles, *gains]
        each += sum(2 * t[0].numel() for t in rows if t is not None)
        substrate = linear.substrate
        scales = linear.d_out if substrate.granularity == "row" else 1  # type: ignore[union-attr]
        bias = 0 if linear.bias is None else linear.d_out
        total += packed_size(linear.d_out * linear.d_in) + 4 * (scales + bias)
    if not isinstance(experts.down, ButterflyLinear):
        total += 4 * sum(p.numel() for p in experts.down.parameters())
    if layer.correction is not None:
        total += correction_bytes(layer.d_model, layer.d_out, layer.correction.rank)
    return total + each * num_experts
