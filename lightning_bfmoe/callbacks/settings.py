"""From the callback's keyword arguments, which a YAML file can hold, to one config and one plan."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_bfmoe.calibrate import Calibration, Recipe
from lightning_bfmoe.calibrate.feed_forward import check_settings
from lightning_bfmoe.config import ButterflyMoEConfig
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan import Plan


def resolve_config(
    config: ButterflyMoEConfig | Mapping[str, Any] | None,
    preset: str | None,
    overrides: Mapping[str, Any],
) -> ButterflyMoEConfig:
    """One config from a config or a preset, and single settings; those that are None are not set.

    Example:
        >>> resolve_config(None, "paper", {"num_experts": 16, "angle_std": None}).num_experts
        16

    Raises:
        ConfigError: Both a config and a preset, or a value out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    calibrated = given.get("init") == "calibrated"
    if calibrated:
        given["init"] = "preserve"  # what the layers are: weights that were found, and are kept
    if config is not None and preset is not None:
        raise ConfigError(
            "settings start from a config or from a preset, not from both",
            got=f"config and preset={preset!r}",
            fix="Use config=ButterflyMoEConfig.preset(...).",
        )
    if config is None:
        found = ButterflyMoEConfig.preset(preset or "default", **given)
    else:
        data = config.to_dict() if isinstance(config, ButterflyMoEConfig) else dict(config)
        found = ButterflyMoEConfig.from_dict({**data, **given})
    if calibrated:
        check_settings(found)
    return found


CALIBRATED_PLAN = Plan(start=0, end=0, freeze_latents=0.5)
"""Of ``init="calibrated"``: its latents lie on the ternary grid, so lambda is 1 from the start, and
they stand still at first while angles, biases and router learn (`docs/decisions.md`)."""


SCRATCH_PLAN = Plan(start=0, end=0)
"""Of ``init="scratch"``: ternary from the first step, which ended lower than a ramp."""


def default_plan(config: ButterflyMoEConfig, calibrated: bool) -> Plan:
    """The plan where none is given: it depends on how the layers start."""
    if calibrated:
        return CALIBRATED_PLAN
    return SCRATCH_PLAN if config.init == "scratch" else Plan()


def resolve_plan(plan: Plan | Mapping[str, Any] | None, default: Plan = Plan()) -> Plan:  # noqa: B008
    """The plan, from an object, a mapping (a nested YAML or Hydra node) or nothing."""
    if plan is None:
        return default
    return plan if isinstance(plan, Plan) else Plan(**dict(plan))


def resolve_calibration(
    init: str | None, batches: int | None, calibration: Calibration | Mapping[str, Any] | None
) -> Calibration | None:
    """Settings of the calibration that ``init="calibrated"`` asks for; None without it.

    Example:
        >>> resolve_calibration("calibrated", 16, None).max_batches
        16

    Raises:
        ConfigError: Settings of a calibration without ``init="calibrated"``, or out of range.
    """
    if init != "calibrated":
        if batches is None and calibration is None:
            return None
        raise ConfigError(
            "calibration_batches and calibration go with init='calibrated'",
            got=f"init={init!r}",
            fix="Write ButterflyMoECallback(init='calibrated', ...), or leave them out.",
        )
    if calibration is None:
        calibration = Calibration()
    elif not isinstance(calibration, Calibration):
        fields = dict(calibration)
        if isinstance(fields.get("recipe"), Mapping):
            fields["recipe"] = Recipe(**dict(fields["recipe"]))
        calibration = Calibration(**fields)
    if batches is None:
        return calibration
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 2:
        raise ConfigError(
            "calibration_batches is a number of batches, at least 2, some of which judge",
            got=f"calibration_batches={batches!r}",
            fix="Use calibration_batches=32.",
        )
    return dataclasses.replace(calibration, max_batches=batches)


def resolve_patterns(patterns: str | Iterable[str] | None) -> str | list[str] | None:
    """Patterns as plain data, whatever kind of list a config library brought."""
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)


def differing_settings(config: ButterflyMoEConfig, layer_settings: Mapping[str, Any]) -> list[str]:
    """What a layer that is there already has otherwise than the config asks for."""
    asked = {**config.to_dict(), "scale": config.scale_or_default}
    compared = (
        "num_experts", "top_k", "gains", "stages", "scale", "granularity", "down",
        "activation_bits", "correction_rank",
    )  # fmt: skip
    return [
        f"{name}={layer_settings[name]!r} (asked: {asked[name]!r})"
        for name in compared
        if name in layer_settings and layer_settings[name] != asked[name]
    ]
