"""The same surgery again, from plain data: for loading a checkpoint into a fresh model."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_bfmoe.errors import BFMoEError, SwapError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.bypass import LinearBypass, share_basis
from lightning_bfmoe.layers.state import LATER_SETTINGS, decode_extra_state
from lightning_bfmoe.layers.surgery import ReplacementPlan, check_form, find_slot, rebase
from lightning_bfmoe.swap.build import KINDS, activation_from_model, finish_layer
from lightning_bfmoe.swap.quiet import keep_rng, plain_defaults
from lightning_bfmoe.swap.report import PLAN_VERSION, SwappedBlock, SwapReport, layer_sizes
from lightning_bfmoe.swap.swap import install, plan_entry

_SUFFIXES = ("_extra_state", "written")  # of a layer, of a bypass
_KINDS: dict[str, type[ButterflyMoE | ButterflyExperts | LinearBypass]] = {
    **KINDS,
    "LinearBypass": LinearBypass,
}


def apply_swap_plan(model: nn.Module, plan: Mapping[str, Any]) -> SwapReport:
    """Repeats a swap without looking at any weight: same slots, same settings, fresh parameters.

    Load the checkpoint's state_dict afterwards. Slots that hold the planned layer already are
    left alone, so the call is idempotent. If one entry does not fit, nothing is changed.

    Example:
        >>> from lightning_bfmoe.swap import swap_feed_forward
        >>> make = lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model, fresh = make(), make()
        >>> report = swap_feed_forward(model)
        >>> _ = apply_swap_plan(fresh, report.plan())
        >>> fresh.load_state_dict(model.state_dict())
        <All keys matched successfully>

    Args:
        model: A model built like the one that was swapped, its weights may be anything.
        plan: `SwapReport.plan()`, or `plan_from_state_dict` of a checkpoint.

    Returns:
        A report that `restore` accepts; its errors are None.

    Raises:
        SwapError: The plan is of another version or malformed, or the model lacks a slot.
    """
    entries = []
    with keep_rng():
        for entry in _check_plan(plan):
            if not _stands_already(model, entry):
                entries.append((_placement(entry), _rebuild(model, entry)))
        share_basis([layer for _, layer in entries if isinstance(layer, LinearBypass)])
        receipts = install(model, entries)
    report = SwapReport(receipts=receipts, placements=[plan_entry(layer) for layer, _ in receipts])
    report.blocks = [_row(m) for m, _ in receipts if not isinstance(m, LinearBypass)]
    return report


def plan_from_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of all swaps whose layers are in a state_dict, wherever its root is.

    Layers that were built by hand, and never swapped in, are left out: their model builds them.

    Example:
        >>> from lightning_bfmoe.swap import swap_feed_forward
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> report = swap_feed_forward(model)
        >>> plan_from_state_dict(model.state_dict()) == report.plan()
        True

    Args:
        state_dict: Of a swapped model, or of a module around or inside it.

    Returns:
        A plan for `apply_swap_plan`; without replacements when there are no swapped layers.

    Raises:
        SwapError: A placement in it is malformed.
    """
    entries: dict[str, ReplacementPlan] = {}
    for key, state in state_dict.items():
        place, _, suffix = key.rpartition(".")
        state = decode_extra_state(state) if suffix in _SUFFIXES else None
        if state is None or not state.get("placement"):
            continue
        written = check_form(state["placement"])
        if place in {alias for entry in entries.values() for alias in entry["aliases"]}:
            continue  # a shared layer, seen again at another of its places
        entry = rebase(written, place)
        extra = {"kind": state.get("kind"), "settings": dict(state.get("settings") or {})}
        entries[place] = check_form({**entry, "layer": {**entry.get("layer", {}), **extra}})
    return {"version": PLAN_VERSION, "replacements": list(entries.values())}


def _check_plan(plan: Mapping[str, Any]) -> list[ReplacementPlan]:
    if not isinstance(plan, Mapping) or plan.get("version") != PLAN_VERSION:
        raise SwapError(
            f"a swap plan has version {PLAN_VERSION}",
            got=repr(plan.get("version") if isinstance(plan, Mapping) else type(plan).__name__),
            fix="Use report.plan(), or the library version that wrote it.",
        )
    entries = [check_form(entry) for entry in plan.get("replacements", [])]
    for entry in entries:
        layer = entry.get("layer", {})
        if layer.get("kind") not in _KINDS or not isinstance(layer.get("settings"), dict):
            raise SwapError(
                f"a swap plan names one of the layers {sorted(_KINDS)} with its settings",
                got=f"{entry['path']!r}: {layer.get('kind')!r}",
                fix="Use report.plan() or plan_from_state_dict().",
            )
    return entries


def _stands_already(model: nn.Module, entry: ReplacementPlan) -> bool:
    owner, name = find_slot(model, entry["path"])
    layer, wanted = getattr(owner, name), entry["layer"]
    if not isinstance(layer, ButterflyMoE | ButterflyExperts | LinearBypass):
        return False
    ignored = ("seed", "angle_std")
    settings = [
        {k: v for k, v in {**LATER_SETTINGS, **s}.items() if k not in ignored}
        for s in (layer.settings, wanted["settings"])
    ]
    if type(layer).__name__ != wanted["kind"] or settings[0] != settings[1]:
        raise SwapError(
            "a slot that is swapped already must hold the planned layer",
            got=f"{entry['path']!r}: {layer.settings}, planned {wanted['settings']}",
            fix="Build the model afresh, or restore it, before applying the plan.",
        )
    return True


def _placement(entry: ReplacementPlan) -> ReplacementPlan:
    """The entry as the first swap left it on its layer: how it is built stands in the settings."""
    layer = {k: v for k, v in entry["layer"].items() if k not in ("kind", "settings")}
    return {**entry, "layer": layer}


def _rebuild(
    model: nn.Module, entry: ReplacementPlan
) -> ButterflyMoE | ButterflyExperts | LinearBypass:
    layer = entry["layer"]
    originals = [getattr(*find_slot(model, slot)) for slot in (entry["path"], *entry["identities"])]
    modules = [m for m in originals if isinstance(m, nn.Module)]
    parameters = [p for m in modules for p in m.parameters()]
    settings = dict(layer["settings"])
    if (activation := activation_from_model(model, entry)) is not None:
        settings["activation"] = activation
    kind = _KINDS[layer["kind"]]
    try:
        inspect.signature(kind).bind(**settings)
        with plain_defaults():
            built = kind(**settings, device=parameters[0].device if parameters else None)
    except (TypeError, BFMoEError) as error:
        raise SwapError(
            "the settings in a swap plan must be those of its layer",
            got=f"{entry['path']!r}: {error}",
            fix="Use report.plan() or plan_from_state_dict().",
        ) from error
    finish_layer(built, modules, float(layer.get("output_dropout", 0.0)))
    return built


def _row(layer: ButterflyMoE | ButterflyExperts) -> SwappedBlock:
    s, placement = layer.settings, layer.placement or {}
    parameters, packed = layer_sizes(s, router=isinstance(layer, ButterflyMoE))
    return SwappedBlock(
        path=placement["path"],
        owner=placement["path"],
        family=placement.get("layer", {}).get("family", "plan"),
        d_model=s["d_model"],
        d_ff=s["d_ff"],
        d_out=s["d_out"],
        gated=s["gated"],
        activation=s["activation"],
        num_experts=s["num_experts"],
        places=1 + len(placement["aliases"]),
        own_router=not isinstance(layer, ButterflyMoE),
        parameters_before=0,
        bytes_before=0,
        parameters_after=parameters,
        packed_bytes=packed,
    )
