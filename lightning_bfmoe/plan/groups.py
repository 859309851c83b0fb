"""Parameter groups: angles learn faster and nothing of ours but the big matrices decays.

Works on an optimizer (and its schedulers) that somebody else has built.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan.schedulers import RATE_KEYS, Piece, extend_scheduler

GROUP_KEY = "bfmoe"
"""Key in a parameter group that says which of ours it holds: "angle" or "plain"."""

_TREATMENT = {"angle": "angle", "gain": "plain", "router": "plain", "bias": "plain"}


def split_parameter_groups(
    optimizer: Optimizer,
    roles: Mapping[Tensor, str],
    angle_lr_factor: float = 20.0,
    *,
    schedulers: Iterable[Any] = (),
) -> int:
    """Give the angles their own groups: learning rate times a factor, no weight decay.

    Gains, routers and biases of ours move to groups without weight decay; all other parameters stay
    where they are, with every setting of their group. The optimizer's state is kept, and its
    schedulers continue, the new groups included. A second call changes nothing.

    Example:
        >>> import torch
        >>> w, angles = (torch.zeros(2, requires_grad=True) for _ in range(2))
        >>> optimizer = torch.optim.AdamW([w, angles], lr=1e-3, weight_decay=0.1)
        >>> split_parameter_groups(optimizer, {angles: "angle"})
        1
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.1), (0.02, 0.0)]

    Args:
        optimizer: Any torch optimizer; changed in place.
        roles: Role of our parameters ("angle", "gain", "router", "bias"; others stay), as in
            `layers.parameter_roles`, by the parameter itself.
        angle_lr_factor: Learning rate of the angles over that of their old group, > 0.
        schedulers: The schedulers of this optimizer.

    Returns:
        Number of groups added.

    Raises:
        ConfigError: The factor is not positive.

    Source: measured (docs/decisions.md): without it the experts stay near one another.
    """
    check_factor(angle_lr_factor)
    if isinstance(optimizer, torch.optim.LBFGS):
        return 0  # knows one group only
    treatment = {id(p): _TREATMENT[role] for p, role in roles.items() if role in _TREATMENT}
    groups = optimizer.param_groups
    kept: list[tuple[dict[str, Any], Piece]] = []
    added: list[tuple[dict[str, Any], Piece]] = []
    for i, group in enumerate(groups):
        first, *others = _pieces(group, i, treatment, angle_lr_factor)
        kept.append(first)
        added += others
    pieces = [piece for _, piece in (*kept, *added)]
    if not added and all(piece.factor == 1.0 for piece in pieces):
        return 0
    before = len(groups)
    groups[:] = [group for group, _ in (*kept, *added)]  # in place: others hold this list
    for scheduler in schedulers:
        extend_scheduler(scheduler, pieces, before)
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


def _pieces(
    group: dict[str, Any], index: int, treatment: Mapping[int, str], angle_lr_factor: float
) -> list[tuple[dict[str, Any], Piece]]:
    """A group cut by treatment; the first piece is the old dictionary itself."""
    if GROUP_KEY in group:
        return [(group, Piece(index, 1.0))]
    entries = [(p, treatment.get(id(p), "")) for p in group["params"]]
    if not group.get("weight_decay", 0.0):  # nothing to switch off: the order stays
        entries = [(p, "" if kind == "plain" else kind) for p, kind in entries]
    names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    present = {kind for _, kind in entries}
    result: list[tuple[dict[str, Any], Piece]] = []
    for kind in [k for k in ("", "plain", "angle") if k in present] or [""]:
        piece = dict(settings) if result else group
        piece["params"] = [p for p, its in entries if its == kind]
        if names:
            piece["param_names"] = [names[id(p)] for p in piece["params"]]
        factor = angle_lr_factor if kind == "angle" else 1.0
        if kind:
            _treat(piece, kind, factor)
        result.append((piece, Piece(index, factor)))
    return result


def _treat(group: dict[str, Any], kind: str, factor: float) -> None:
    group[GROUP_KEY] = kind
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    for key in RATE_KEYS:
        if group.get(key) is not None:
            group[key] = group[key] if factor == 1.0 else group[key] * factor
