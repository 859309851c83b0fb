"""Factors on learning rate and weight decay that hold during an optimizer step, and only then.

Between two steps the groups hold what their owner wrote there, and while the closure of a step runs
as well (which is where Lightning runs `training_step`). So a scheduler, a learning-rate finder, a
checkpoint or a line of the user's that sets ``group["lr"]`` never meets a factor.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch.optim import LBFGS, Optimizer

from lightning_bfmoe.errors import ConfigError

Rule = Callable[[dict[str, Any]], tuple[float, float]]
"""From a parameter group to its factors on learning rate and weight decay."""

_SCALED = ("lr", "weight_decay")
# One for each optimizer: hooks of several owners would put their values back in the wrong order.
_scalers: "weakref.WeakKeyDictionary[Optimizer, _Scaler]" = weakref.WeakKeyDictionary()


class StepScale:
    """What `scale_steps` gives; `remove()` ends the factors of its rule."""

    def __init__(self, scaler: "_Scaler", key: Hashable) -> None:
        self._scaler, self._key = scaler, key

    def remove(self) -> None:
        """End these factors; in the middle of a step the groups get their own values back."""
        self._scaler.restore()
        self._scaler.rules.pop(self._key, None)


def scale_steps(optimizer: Optimizer, rule: Rule, key: Hashable = None) -> StepScale:
    """Multiply learning rate and weight decay of groups during each step of an optimizer.

    Example:
        >>> import torch
        >>> w = torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> handle = scale_steps(optimizer, lambda group: (10.0, 1.0))
        >>> w.grad = torch.ones(1)
        >>> optimizer.step()
        >>> w.item(), optimizer.param_groups[0]["lr"]
        (-5.0, 0.5)

    Args:
        optimizer: Any torch optimizer.
        rule: Asked for each group at each step; the factors of several rules multiply.
        key: A rule under the same key is replaced; None adds one.

    Returns:
        A handle, to end it.

    Raises:
        ConfigError: The optimizer has no step hooks.
    """
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise ConfigError(
            "an optimizer whose steps are scaled is a torch.optim.Optimizer, with step hooks",
            got=type(optimizer).__name__,
            fix="Use angle_lr_factor=1.0 and a plan without angle_warmup, freeze_latents and "
            "second_stage.",
        )
    scaler = _scalers.get(optimizer)
    if scaler is None:
        scaler = _scalers[optimizer] = _Scaler()
        optimizer.register_step_pre_hook(scaler.before)
        optimizer.register_step_post_hook(scaler.after)
    key = object() if key is None else key
    scaler.rules[key] = rule
    return StepScale(scaler, key)


class _Scaler:
    """The rules of one optimizer, and what its groups held before the present step."""

    def __init__(self) -> None:
        self.rules: dict[Hashable, Rule] = {}
        self.kept: list[tuple[dict[str, Any], str, Any]] = []

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        inside = args[0] is optimizer if args else False  # torch passes it along, others may not
        place = int(inside)
        closure = kwargs.get("closure", args[place] if len(args) > place else None)
        if not callable(closure) or isinstance(optimizer, LBFGS):  # reads its rate at once
            self.scale(optimizer)
            return None

        def closure_then_scale() -> Any:
            self.restore()
            result = closure()
            self.scale(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_scale}
        return (*args[:place], closure_then_scale, *args[place + 1 :]), kwargs

    def scale(self, optimizer: Optimizer) -> None:
        self.restore()  # a step that raised, or that calls its parent's, has left its factors
        for group in optimizer.param_groups:
            factors = [rule(group) for rule in self.rules.values()]
            for i, name in enumerate(_SCALED):
                value = group.get(name)
                for factor in (pair[i] for pair in factors):
                    value = value if factor == 1.0 or value is None else value * factor
                if value is not group.get(name):
                    self.kept.append((group, name, group[name]))
                    group[name] = value

    def after(self, *_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        while self.kept:
            group, name, value = self.kept.pop()
            group[name] = value
