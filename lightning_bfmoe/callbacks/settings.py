"""From the callback's keyword arguments, which a YAML file can hold, to one config and one plan."""

from collections.abc import Iterable, Mapping
from typing import Any

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
    if config is not None and preset is not None:
        raise ConfigError(
            "settings start from a config or from a preset, not from both",
            got=f"config and preset={preset!r}",
            fix="Use config=ButterflyMoEConfig.preset(...).",
        )
    if config is None:
        return ButterflyMoEConfig.preset(preset or "default", **given)
    data = config.to_dict() if isinstance(config, ButterflyMoEConfig) else dict(config)
    return ButterflyMoEConfig.from_dict({**data, **given})


def resolve_plan(plan: Plan | Mapping[str, Any] | None) -> Plan:
    """The plan, from an object, a mapping (a nested YAML or Hydra node) or nothing."""
    if plan is None or isinstance(plan, Plan):
        return plan or Plan()
    return Plan(**dict(plan))


def resolve_patterns(patterns: str | Iterable[str] | None) -> str | list[str] | None:
    """Patterns as plain data, whatever kind of list a config library brought."""
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)


def differing_settings(config: ButterflyMoEConfig, layer_settings: Mapping[str, Any]) -> list[str]:
    """What a layer that is there already has otherwise than the config asks for."""
    asked = config.to_dict()
    compared = (
        "num_experts", "top_k", "gains", "stages", "scale", "granularity", "down",
        "activation_bits",
    )  # fmt: skip
    return [
        f"{name}={layer_settings[name]!r} (asked: {asked[name]!r})"
        for name in compared
        if name in layer_settings and layer_settings[name] != asked[name]
    ]
