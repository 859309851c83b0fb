"""From a model to a snapshot of its experts' angles."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import ButterflyLinear, ButterflyMoE, Rotation, moe_layers
from lightning_bfmoe.viz.recording import Key, Recording, Snapshot

Patterns = str | Iterable[str] | None


def find_rotations(
    model: nn.Module, layers: Patterns = None, rotations: Patterns = None
) -> dict[Key, tuple[nn.Module, int]]:
    """Every rotation of a model, and its width d, by layer path and role.

    Example:
        >>> found = find_rotations(ButterflyMoE(8, 16, num_experts=2))
        >>> {key: d for key, (_, d) in found.items()}
        {('model', 'up/in'): 8, ('model', 'up/out'): 16, ('model', 'down/in'): 16,
         ('model', 'down/out'): 8}

    Args:
        model: Any module with ButterflyMoE or ButterflyExperts layers in it, or one
            `ButterflyLinear` or `Rotation`.
        layers: Patterns (`fnmatch`) of layer paths; all when None.
        rotations: Patterns of ``up/in``, ``down/out``, ...; all when None.

    Raises:
        ConfigError: None is there, or none fits.
    """
    found: dict[Key, tuple[nn.Module, int]] = {}
    if isinstance(model, Rotation):
        found["model", "rotation"] = (model, model.d)
    elif isinstance(model, ButterflyLinear):
        found["model", "in"] = (model.rotate_in, model.d_in)
        found["model", "out"] = (model.rotate_out, model.d_out)
    for name, layer in moe_layers(model):
        experts = layer.experts if isinstance(layer, ButterflyMoE) else layer
        for role, linear in experts.linears().items():
            found[name or "model", f"{role}/in"] = (linear.rotate_in, linear.d_in)
            found[name or "model", f"{role}/out"] = (linear.rotate_out, linear.d_out)
    fitting = {k: v for k, v in found.items() if _fits(k[0], layers) and _fits(k[1], rotations)}
    if not fitting:
        names = [f"{layer} {rotation}" for layer, rotation in found]
        raise ConfigError(
            "a model to look at has rotations of ButterflyMoE layers that fit the patterns",
            got=f"{type(model).__name__} with {len(names)} of them: {', '.join(names[:8])}",
            fix="Correct layers= or rotations=, or swap the model's blocks first "
            "(ButterflyMoECallback, swap_feed_forward).",
        )
    return fitting


def _fits(name: str, patterns: Patterns) -> bool:
    wanted = [patterns] if isinstance(patterns, str) else patterns
    return wanted is None or any(fnmatchcase(name, pattern) for pattern in wanted)


@torch.no_grad()
def read_angles(rotation: nn.Module) -> Tensor:
    """Angles of all experts on the CPU, (experts, stages, pairs) float16, within [-pi, pi].

    A sharded parameter (FSDP2) is gathered, so every rank has to call this.
    """
    angles: Tensor = rotation.angles  # type: ignore[assignment]
    if hasattr(angles, "full_tensor"):
        angles = angles.full_tensor()
    wide = angles.detach().double()
    wide = wide - 2 * torch.pi * torch.round(wide / (2 * torch.pi))
    return wide.to(torch.float16).cpu()


def record_model(
    model: nn.Module, layers: Patterns = None, rotations: Patterns = None, *, step: int = 0
) -> Recording:
    """A recording with one record: what the model is now.

    Example:
        >>> record_model(ButterflyMoE(8, 16, num_experts=2)).angles("model", "up/out").shape
        (1, 2, 4, 8)

    Args:
        model: See `find_rotations`.
        layers: Patterns of layer paths.
        rotations: Patterns of rotations.
        step: Its name on the axis of steps.
    """
    found = find_rotations(model, layers, rotations)
    angles = {key: np.asarray(read_angles(rotation)) for key, (rotation, _) in found.items()}
    return Recording({key: d for key, (_, d) in found.items()}, [Snapshot(step, angles)])
