"""Putting a layer into a model and taking it out again, described as plain data.

A feed-forward block is not always one module: BERT splits it over two, an encoder layer keeps its
activation as a function, a `Sequential` mixes it with other layers. So a replacement is a small
dictionary, a *placement*, that `swap/` writes, the layer carries as `layer.placement`, and a packed
file stores as JSON:

    {"path": "blocks.0.mlp",            the slot that receives the layer
     "aliases": ["blocks.1.mlp"],       other slots that held the same (shared) module
     "identities": ["blocks.0.drop"],   modules, or callables kept as attributes, that become x -> x
     "attributes": {"blocks.0.fast": 0}}  settings: number, bool, string or None

All paths are dotted and relative to one root module.
"""

import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor, nn

from lightning_bfmoe.errors import SwapError

Scalar = bool | int | float | str | None


class ReplacementPlan(TypedDict, total=False):
    """The plain-data form of one replacement; see the module docstring for each field."""

    path: str
    aliases: list[str]
    identities: list[str]
    attributes: dict[str, Scalar]
    layer: dict[str, Any]


@dataclass
class Replaced:
    """The receipt of one replacement: what stood in each slot before."""

    before: list[tuple[Any, str, Any]] = field(default_factory=list)

    def revert(self) -> None:
        """Puts every original object back, last change first."""
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)
        self.before.clear()


def identity(x: Tensor) -> Tensor:
    """Returns its argument: what a removed activation function becomes."""
    return x


def replacement(
    path: str,
    *,
    aliases: tuple[str, ...] | list[str] = (),
    identities: tuple[str, ...] | list[str] = (),
    attributes: dict[str, Scalar] | None = None,
) -> ReplacementPlan:
    """Writes down one replacement and checks its form.

    Example:
        >>> replacement("0", identities=["1", "2"])["identities"]
        ['1', '2']

    Args:
        path: Slot that receives the layer.
        aliases: Other slots that hold the same module.
        identities: Slots that become the identity.
        attributes: Settings, by the dotted path of the attribute.

    Raises:
        SwapError: A path is empty or doubled, or a value is not a plain scalar.
    """
    return check_form(
        {
            "path": path,
            "aliases": list(aliases),
            "identities": list(identities),
            "attributes": dict(attributes or {}),
        }
    )


def check_form(entry: object) -> ReplacementPlan:
    """Returns a normalised copy of a placement that may come from a file nobody vouches for.

    Raises:
        SwapError: A field is missing, unknown or of the wrong kind, or a slot is named twice.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise SwapError("a placement must be a dict with a 'path'", got=entry, fix=_WRITE)
    if unknown := set(entry) - set(ReplacementPlan.__annotations__):
        raise SwapError(
            "a placement has only known fields", got=sorted(map(str, unknown)), fix=_WRITE
        )
    aliases, identities = entry.get("aliases") or [], entry.get("identities") or []
    attributes, layer = entry.get("attributes") or {}, entry.get("layer")
    if not (isinstance(aliases, list) and isinstance(identities, list)):
        raise SwapError("'aliases' and 'identities' must be lists", got=entry, fix=_WRITE)
    if not isinstance(attributes, dict) or not all(map(_is_scalar, attributes.values())):
        raise SwapError("'attributes' must map paths to plain scalars", got=attributes, fix=_WRITE)
    if layer is not None and not isinstance(layer, dict):
        raise SwapError("'layer' must be a dict", got=layer, fix=_WRITE)
    slots = [entry["path"], *aliases, *identities, *attributes]
    if bad := [slot for slot in slots if not (isinstance(slot, str) and all(slot.split(".")))]:
        raise SwapError("a slot must be a dotted path below the root", got=bad[0], fix=_WRITE)
    if len(set(slots)) != len(slots):
        raise SwapError("a placement names each slot once", got=slots, fix=_WRITE)
    plan: ReplacementPlan = {
        "path": entry["path"],
        "aliases": list(aliases),
        "identities": list(identities),
        "attributes": dict(attributes),
    }
    if layer is not None:
        plan["layer"] = dict(layer)
    return plan


def apply_replacement(model: nn.Module, entry: ReplacementPlan, module: nn.Module) -> Replaced:
    """Puts `module` into its slots; every slot is looked up before the first one is changed.

    The layer takes over the training flag of the module it replaces and gets `entry` as its
    `placement`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> receipt = apply_replacement(model, replacement("0", identities=["1", "2"]), nn.Tanh())
        >>> [type(child).__name__ for child in model]
        ['Tanh', 'Identity', 'Identity']
        >>> receipt.revert(); type(model[0]).__name__
        'Linear'

    Args:
        model: The root that the paths of `entry` start from.
        entry: The placement.
        module: The layer.

    Returns:
        A receipt whose `revert` restores the very objects that were there.

    Raises:
        SwapError: A slot does not exist in `model`, or is of the wrong kind.
    """
    entry = check_form(entry)
    changes: list[tuple[nn.Module, str, Any]] = []
    for slot in (entry["path"], *entry["aliases"]):
        owner, name = find_slot(model, slot)
        if name not in owner._modules:
            raise SwapError("the layer's slot must hold a module", got=slot, fix=_SAME_MODEL)
        changes.append((owner, name, module))
    for slot in entry["identities"]:
        owner, name = find_slot(model, slot)
        old = getattr(owner, name)
        if not callable(old):
            raise SwapError("only a module or callable becomes the identity", got=slot)
        new = nn.Identity().train(old.training) if isinstance(old, nn.Module) else identity
        changes.append((owner, name, new))
    for slot, setting in entry["attributes"].items():
        owner, name = find_slot(model, slot)
        if name.startswith("_") or name not in vars(owner):
            raise SwapError("a setting must be a plain public attribute", got=slot, fix=_SAME_MODEL)
        changes.append((owner, name, setting))
    receipt = Replaced([(owner, name, getattr(owner, name)) for owner, name, _ in changes])
    module.train(receipt.before[0][2].training)  # type: ignore[attr-defined]
    for owner, name, value in changes:
        setattr(owner, name, value)
    module.placement = entry  # type: ignore[assignment]
    return receipt


def find_slot(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module that owns `path` and the attribute's name there.

    Only registered children are followed, so a path from a file reaches modules and nothing else.

    Raises:
        SwapError: There is no such module or attribute.
    """
    *parents, name = path.split(".")
    owner = model
    for part in parents:
        child = owner._modules.get(part)
        if child is None:
            raise SwapError(
                "every slot of a placement must exist in the model",
                got=f"{path!r}, and {type(owner).__name__} has no child {part!r}",
                fix=_SAME_MODEL,
            )
        owner = child
    if owner._modules.get(name) is None and name not in vars(owner):
        raise SwapError(
            "every slot of a placement must exist in the model",
            got=f"{path!r}, and {type(owner).__name__} has no attribute {name!r}",
            fix=_SAME_MODEL,
        )
    return owner, name


def rebase(entry: ReplacementPlan, path: str) -> ReplacementPlan:
    """Rewrites a placement for another root, in which the layer stands at `path`.

    A layer swapped inside a `LightningModule` (`model.blocks.0.mlp`) and packed from its inner
    model (`blocks.0.mlp`), or the other way round, keeps its placement this way.

    Example:
        >>> rebase(replacement("model.0", identities=["model.1"]), "0")["identities"]
        ['1']

    Raises:
        SwapError: `path` is not the same slot seen from another root, or a slot lies outside it.
    """
    entry = check_form(entry)
    old, added = entry["path"], ""
    if old == path:
        return entry
    if path.endswith("." + old):
        old, added = "", path[: -len(old)]
    elif old.endswith("." + path):
        old = old[: -len(path)]
    else:
        raise SwapError(
            "a layer must stand where its placement says, seen from some root",
            got=f"placement {entry['path']!r}, found at {path!r}",
            fix="Delete the attribute `placement` of a layer that you moved by hand.",
        )

    def move(slot: str) -> str:
        if not slot.startswith(old):
            raise SwapError(
                "a placement must lie inside the model that is packed",
                got=f"{slot!r} outside {old!r}",
                fix="Pack the larger model.",
            )
        return added + slot[len(old) :]

    moved = {
        "path": path,
        "aliases": [move(slot) for slot in entry["aliases"]],
        "identities": [move(slot) for slot in entry["identities"]],
        "attributes": {move(slot): value for slot, value in entry["attributes"].items()},
    }
    return check_form(entry | moved)


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


_WRITE = "Write placements with `surgery.replacement(path, aliases=, identities=, attributes=)`."
_SAME_MODEL = "Build the model with the same code and sizes as the one that was swapped."
