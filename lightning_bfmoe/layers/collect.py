"""Functions over all ButterflyMoE layers of a model."""

from collections.abc import Iterator

from torch import nn

from lightning_bfmoe.layers.experts import ButterflyExperts
from lightning_bfmoe.layers.moe import ButterflyMoE
from lightning_bfmoe.layers.router import TopKRouter, balance_together

_ROLES = {
    "angles": "angle",
    "latent": "latent",
    "gain_in": "gain",
    "gain_out": "gain",
    "bias": "bias",
}


def moe_layers(model: nn.Module) -> Iterator[tuple[str, ButterflyMoE | ButterflyExperts]]:
    """Every `ButterflyMoE`, and every `ButterflyExperts` that stands alone, with its path.

    A shared layer comes once.
    """
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ButterflyMoE):
            inside.add(id(module.experts))
            yield name, module
        elif isinstance(module, ButterflyExperts) and id(module) not in inside:
            yield name, module


def routers(model: nn.Module) -> Iterator[tuple[str, TopKRouter]]:
    """Every router of ours with its path."""
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter):
            yield name, module


def set_blend(model: nn.Module, value: float) -> None:
    """Set lambda of all layers: 0 latent, 1 ternary."""
    for _, layer in moe_layers(model):
        layer.set_blend(value)


def update_balance(model: nn.Module) -> None:
    """Move every balance bias once; call it after `optimizer.step()`."""
    balance_together(router for _, router in routers(model))


def set_loss_scale(model: nn.Module, value: float) -> None:
    """Scale the layers' own losses like the root loss: GradScaler scale / accumulated batches."""
    for _, router in routers(model):
        router.set_loss_scale(value)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of each of our parameters by full name; parameters of other modules are left out.

    Roles: angle, latent, gain, router, bias, projection, correction.
    """
    roles: dict[str, str] = {}
    for path, layer in moe_layers(model):
        for name, _ in layer.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            role = "router" if name.startswith("router.") else _ROLES.get(leaf, "other")
            if name in ("experts.down.weight", "down.weight"):
                role = "projection"
            elif name.startswith("correction."):
                role = "correction"
            roles[f"{path}.{name}" if path else name] = role
    return roles
