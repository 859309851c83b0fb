"""The names under which a Trainer finds the strategy, and registering them without Lightning.

`Trainer(strategy="bfmoe")` looks in a registry that Lightning fills when it is imported; it reads
no entry points. So ``import lightning_bfmoe`` must put the names there, in whichever order the two
are imported, and must not import Lightning itself, which takes seconds and may not be installed.
If Lightning is there already, the names are registered at once. Else a finder on `sys.meta_path`
waits for the module that holds the registry, lets it be found and run as always, and registers
right after. What is registered is a function, so our own modules are imported at the first use.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from lightning_bfmoe.errors import ConfigError

NAMES = {
    "bfmoe": "popen",
    "bfmoe_ddp": "popen",
    "bfmoe_ddp_spawn": "spawn",
    "bfmoe_ddp_fork": "fork",
    "bfmoe_ddp_notebook": "fork",
}
"""Name of the strategy -> how its processes are started."""


def build(**settings: Any) -> Any:
    """The strategy; the value that Lightning's registry holds."""
    from lightning_bfmoe.strategy.strategy import ButterflyMoEStrategy

    return ButterflyMoEStrategy(**settings)


def refuse(**settings: Any) -> Any:
    """The value in the registry of `pytorch_lightning`, which keeps classes of its own.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "ButterflyMoEStrategy belongs to the Trainer of the package lightning",
        got="pytorch_lightning.Trainer, whose classes are other ones",
        fix="Write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`, "
        "for the Trainer and the LightningModule; both packages are installed together.",
    )


def register(registry: Any, value: Callable[..., Any] = build) -> None:
    """Put the names into a registry; those that are there stay as they are.

    Example:
        >>> from lightning.fabric.strategies.registry import _StrategyRegistry
        >>> registry = _StrategyRegistry()
        >>> register(registry)
        >>> registry.available_strategies()[:2]
        ['bfmoe', 'bfmoe_ddp']
    """
    for name, start_method in NAMES.items():
        if name not in registry:
            text = f"DDP for ButterflyMoE layers with `start_method` '{start_method}'"
            registry.register(name, value, description=text, start_method=start_method)


_VALUES: dict[str, Callable[..., Any]] = {
    "lightning.pytorch.strategies": build,
    "pytorch_lightning.strategies": refuse,
}
"""Module that holds a registry -> what to register there."""


def _register_in(module: ModuleType) -> None:
    registry = getattr(module, "StrategyRegistry", None)
    if registry is not None:
        register(registry, _VALUES[module.__name__])


class _Announcing(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register_in(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: it hands on what the other finders find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _VALUES:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(fullname, path, target)
            if found is not None:
                if hasattr(found.loader, "exec_module"):
                    found.loader = _Announcing(found.loader)
                return found
        return None


def install() -> None:
    """Register now where Lightning is imported, and when it will be where it is not.

    A second call changes nothing.
    """
    missing = [name for name in _VALUES if name not in sys.modules]
    for name in _VALUES.keys() - set(missing):
        _register_in(sys.modules[name])
    if missing and not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
