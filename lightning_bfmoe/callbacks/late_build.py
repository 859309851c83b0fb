"""Looking again after hooks in which a module may build its layers: `setup` and `configure_model`.

`Callback.setup` runs before both. So each overridden hook is covered once by a wrapper that takes
itself out before anything else happens: a copy or a pickle of the module made later knows nothing
of it, and Lightning's `is_overridden` looks through it.
"""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

HOOKS = ("setup", "configure_model")
_WATCHERS = "_bfmoe_watchers"


def watch(module: pl.LightningModule, owner: str, after: Callable[[bool], None]) -> bool:
    """Call `after` once behind each hook of `module` that can still build layers.

    Args:
        module: The user's module.
        owner: Name of who watches, for `unwatch`.
        after: Gets whether the hook brought new modules.

    Returns:
        Whether there is any such hook.
    """
    waiting = [name for name in HOOKS if is_overridden(name, module, pl.LightningModule)]
    for name in waiting:
        if _watchers(module, name) is None:
            _cover(module, name)
        watchers = _watchers(module, name)
        assert watchers is not None
        watchers[owner] = after
    return bool(waiting)


def is_watched(module: nn.Module, owner: str) -> bool:
    """Whether a hook that `owner` waits for has not run yet."""
    return any(owner in (_watchers(module, name) or {}) for name in HOOKS)


def unwatch(module: nn.Module, owner: str | None = None) -> None:
    """Take out wrappers that have not run: those of one owner, or all (in a copy of a module)."""
    for name in HOOKS:
        watchers = _watchers(module, name)
        if watchers is None:
            continue
        left = {} if owner is None else {k: v for k, v in watchers.items() if k != owner}
        wrapper = module.__dict__.pop(name)
        if left and owner is not None:
            watchers.pop(owner, None)
            module.__dict__[name] = wrapper
        elif wrapper._bfmoe_was_in_dict:
            module.__dict__[name] = wrapper.__wrapped__


def _watchers(module: nn.Module, name: str) -> dict[str, Callable[[bool], None]] | None:
    return getattr(module.__dict__.get(name), _WATCHERS, None)


def _cover(module: nn.Module, name: str) -> None:
    original, patched = getattr(module, name), name in module.__dict__

    @functools.wraps(original)
    def once(*args: Any, **kwargs: Any) -> Any:
        watchers = dict(getattr(once, _WATCHERS))
        if module.__dict__.get(name) is once:
            unwatch_hook = module.__dict__.pop
            unwatch_hook(name)
            if patched:
                module.__dict__[name] = original
        before = list(module.modules())  # held, so that no id is used twice
        result = original(*args, **kwargs)
        known = set(map(id, before))
        new = any(id(m) not in known for m in module.modules())
        for after in watchers.values():
            after(new)
        return result

    setattr(once, _WATCHERS, {})
    once._bfmoe_was_in_dict = patched  # type: ignore[attr-defined]
    module.__dict__[name] = once
