"""Parameter groups: angles learn faster and nothing of ours but the big matrices decays.

Works on an optimizer (and its schedulers) that somebody else has built.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan.eight_bit import keep_wide_state
from lightning_bfmoe.plan.schedulers import extend_scheduler
from lightning_bfmoe.plan.steps import scale_steps

GROUP_KEY = "bfmoe"
"""Key in a parameter group that says which of ours it holds: "angle", "plain" or "latent"."""

_TREATMENT = {"angle": "angle", "gain": "plain", "router": "plain", "bias": "plain"}


def split_parameter_groups(
    optimizer: Optimizer,
    roles: Mapping[Tensor, str],
    angle_lr_factor: float = 20.0,
    *,
    schedulers: Iterable[Any] = (),
    latents_apart: bool = False,
) -> int:
    """Give the angles their own groups: learning rate times a factor, no weight decay.

    The factor holds during each step (`scale_steps`): ``group["lr"]`` stays what the user and their
    schedulers write there, so that a minimum of a schedule or one number written into all groups is
    multiplied too. Gains, routers and biases of ours move to groups without weight decay; all other
    parameters stay where they are, with every setting of their group. The optimizer's state is
    kept, and its schedulers continue, the new groups included. Optimizers with 8-bit state keep
    that of angles, gains, routers and biases in float32. A second call changes nothing.

    Example:
        >>> import torch
        >>> w, angles = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> optimizer = torch.optim.SGD([w, angles], lr=0.5, weight_decay=0.1)
        >>> split_parameter_groups(optimizer, {angles: "angle"})
        1
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.5, 0.1), (0.5, 0.0)]
        >>> w.grad, angles.grad = torch.ones(1), torch.ones(1)
        >>> optimizer.step()
        >>> w.item(), angles.item()
        (-0.5, -10.0)

    Args:
        optimizer: Any torch optimizer; changed in place.
        roles: Role of our parameters ("angle", "gain", "router", "bias", "latent"; others stay), as
            in `layers.parameter_roles`, by the parameter itself.
        angle_lr_factor: Learning rate of the angles over that of their old group, > 0.
        schedulers: The schedulers of this optimizer.
        latents_apart: Whether the latent matrices get groups of their own, with every setting of
            their old one, for factors on their steps.

    Returns:
        Number of groups added.

    Raises:
        ConfigError: The factor is not positive, or the optimizer has no step hooks.

    Source: measured (docs/decisions.md): without it the experts stay near one another.
    """
    check_factor(angle_lr_factor)
    if isinstance(optimizer, torch.optim.LBFGS):
        return 0  # knows one group only
    treatments = {**_TREATMENT, **({"latent": "latent"} if latents_apart else {})}
    treatment = {id(p): treatments[role] for p, role in roles.items() if role in treatments}
    groups = optimizer.param_groups
    before = len(groups)
    kept: list[dict[str, Any]] = []
    added: list[dict[str, Any]] = []
    sources: list[int] = []
    for i, group in enumerate(groups):
        first, *others = _pieces(group, treatment)
        kept.append(first)
        added += others
        sources += [i] * len(others)
    groups[:] = [*kept, *added]  # in place: others hold this list
    if added:
        for scheduler in schedulers:
            extend_scheduler(scheduler, [*range(before), *sources], before)
    held = {id(p): p for group in groups for p in group["params"]}
    small = [held[key] for key, kind in treatment.items() if kind != "latent" and key in held]
    keep_wide_state(optimizer, small)
    angles = frozenset(key for key, kind in treatment.items() if kind == "angle" and key in held)
    if angles:
        _scale_angles(optimizer, angles, angle_lr_factor)
    return len(added)


def check_factor(angle_lr_factor: float) -> float:
    """Return the factor when it is one.

    Raises:
        ConfigError: It is not a finite number > 0.
    """
    if not 0 < angle_lr_factor < float("inf"):
        raise ConfigError(
            "angle_lr_factor must be a finite number > 0",
            got=angle_lr_factor,
            fix="Use 1.0 for the learning rate of the other parameters.",
        )
    return angle_lr_factor


def holds(group: Mapping[str, Any], kind: str, parameters: frozenset[int]) -> bool:
    """Whether a group is of a kind of ours ("angle", ...) and of these parameters (by id)."""
    return group.get(GROUP_KEY) == kind and any(id(p) in parameters for p in group["params"])


def _scale_angles(optimizer: Optimizer, angles: frozenset[int], factor: float) -> None:
    def rule(group: dict[str, Any]) -> tuple[float, float]:
        return (factor if holds(group, "angle", angles) else 1.0), 1.0

    if factor != 1.0 or hasattr(optimizer, "register_step_pre_hook"):
        scale_steps(optimizer, rule, key=("angle_lr_factor", angles))


def _pieces(group: dict[str, Any], treatment: Mapping[int, str]) -> list[dict[str, Any]]:
    """A group cut by treatment; the first piece is the old dictionary itself."""
    if GROUP_KEY in group:
        return [group]
    entries = [(p, treatment.get(id(p), "")) for p in group["params"]]
    if not group.get("weight_decay", 0.0):  # nothing to switch off: the order stays
        entries = [(p, "" if kind == "plain" else kind) for p, kind in entries]
    names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    present = {kind for _, kind in entries}
    result: list[dict[str, Any]] = []
    for kind in [k for k in ("", "latent", "plain", "angle") if k in present] or [""]:
        piece = {key: _own(value) for key, value in settings.items()} if result else group
        piece["params"] = [p for p, its in entries if its == kind]
        if names:
            piece["param_names"] = [names[id(p)] for p in piece["params"]]
        if kind:
            piece[GROUP_KEY] = kind
        if kind in ("angle", "plain") and "weight_decay" in piece:
            piece["weight_decay"] = 0.0
        result.append(piece)
    return result


def _own(value: Any) -> Any:
    """A learning rate in a tensor is written in place, so no two groups may share one."""
    return value.clone() if isinstance(value, Tensor) else value
