"""The strategy's keyword arguments: the callback's, Lightning's and torch's, kept apart.

The callback's are taken from its own signature, so that both have the same names for ever.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_bfmoe.callbacks import ButterflyMoECallback
from lightning_bfmoe.callbacks.parts import Part
from lightning_bfmoe.errors import ConfigError

# What the strategy gives to torch's wrapper itself.
_NOT_OPEN = {"self", "kwargs", "module", "device_ids", "output_device", "dim", "process_group"}


def callback_parameters() -> dict[str, inspect.Parameter]:
    """The keyword arguments of `ButterflyMoECallback`.

    Example:
        >>> "num_experts" in callback_parameters()
        True
    """
    return _parameters(ButterflyMoECallback.__init__)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in found.items()
        if name not in _NOT_OPEN
    }


def split_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those for the callback that are not at their default, and those for DDP.

    Example:
        >>> split_settings({"num_experts": 4, "top_k": None, "static_graph": True})
        ({'num_experts': 4}, {'static_graph': True})

    Args:
        given: Keyword arguments as they came.

    Raises:
        ConfigError: A name that nobody knows.
    """
    ours = callback_parameters()
    theirs = {**_parameters(DDPStrategy.__init__), **_parameters(DistributedDataParallel.__init__)}
    for name in given:
        if name not in ours and name not in theirs:
            near = difflib.get_close_matches(name, [*ours, *theirs], n=1)
            raise ConfigError(
                "ButterflyMoEStrategy takes the arguments of ButterflyMoECallback, DDPStrategy and "
                "DistributedDataParallel",
                got=f"{name}={given[name]!r}",
                fix=f"Did you mean {near[0]}?" if near else "Leave it out.",
            )
    settings = {k: v for k, v in given.items() if k in ours and v != ours[k].default}
    return settings, {k: v for k, v in given.items() if k not in ours}


def whole_signature(init: Callable[..., Any]) -> inspect.Signature:
    """The signature of a strategy's ``__init__``, the names behind its ``**kwargs`` written out.

    Editors show it, and LightningCLI reads it to accept and describe the arguments in YAML.
    """
    own = inspect.signature(init)
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    known = {p.name for p in named}
    more = {**callback_parameters(), **_parameters(DDPStrategy.__init__)}
    named += [p for name, p in more.items() if name not in known]
    return own.replace(parameters=[*named, *rest])


def drivers(callbacks: Iterable[pl.Callback]) -> list[pl.Callback]:
    """Callbacks that swap or drive layers: where there is one, the strategy brings none."""
    return [c for c in callbacks if isinstance(c, ButterflyMoECallback | Part)]


def bring_callback(
    trainer: pl.Trainer, settings: Mapping[str, Any], brought: pl.Callback | None
) -> ButterflyMoECallback | None:
    """Put a `ButterflyMoECallback` into the Trainer, unless the user has.

    It stands first, before callbacks that copy the model or collect its modules.

    Args:
        trainer: Before its `setup` hooks.
        settings: Of the strategy, for the callback.
        brought: What an earlier call returned.

    Returns:
        The callback that was brought now or before; None when the user has own ones.

    Raises:
        ConfigError: Settings here, and a callback there.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    theirs = [c for c in drivers(callbacks) if c is not brought]
    if theirs and settings:
        name, words = type(theirs[0]).__name__, ", ".join(f"{k}={v!r}" for k, v in settings.items())
        raise ConfigError(
            "the layers' settings are given once, to the strategy or to a callback",
            got=f"{words} in ButterflyMoEStrategy, and {name} among the Trainer's callbacks",
            fix=f"Drop the {name} to go by the strategy's settings, or move them into it.",
        )
    if theirs:
        if brought is not None and brought in callbacks:
            callbacks.remove(brought)
        return None
    if isinstance(brought, ButterflyMoECallback) and brought in callbacks:
        return brought
    own = brought if isinstance(brought, ButterflyMoECallback) else None
    own = own or ButterflyMoECallback(**settings)
    callbacks.insert(0, own)
    return own
