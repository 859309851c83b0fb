"""Where attention stands in a model: modules that write into the residual stream, told by class.

Libraries name the classes alike and little else, so a class name says "attention" and the rest is
looked up: whether the module ends before the residual is added, or holds that addition too.
"""

import inspect
from collections.abc import Callable

from torch import nn

from lightning_bfmoe.calibrate.streams import Submodule, is_norm

INSIDE = "it adds its residual and normalises inside one module"
SECOND = "it reads a second stream"
CACHED = "a generation cache counts its length by it"
_CACHES = {"past_key_values", "past_key_value", "layer_past", "cache"}


def find_attention(model: nn.Module, width_of: Callable[[str], int | None]) -> list[Submodule]:
    """Attention submodules, outermost ones, in the model's order.

    A module that adds and normalises the residual itself is taken apart: into the attention and the
    projection behind it (BERT), or the attention alone (MPNet). What cannot be taken apart (ALBERT)
    and cross-attention are listed as refused.

    Args:
        model: Any module.
        width_of: Of a path: the width of the residual stream there; None where there is none.
    """
    found: list[Submodule] = []
    outer: list[str] = []  # with a dot behind
    for path, module in model.named_modules():
        if not path or not _is_attention(module) or any(path.startswith(p) for p in outer):
            continue
        width = width_of(path)
        if width is None:
            continue
        outer.append(path + ".")
        if "cross" in type(module).__name__.lower():
            found.append(Submodule(path, "attention", width, refused=SECOND))
        elif not _normalises(module, width):
            found.append(Submodule(path, "attention", width))
        else:
            found.append(_taken_apart(path, module, width))
    return found


def keeps_cache(module: nn.Module) -> bool:
    """Whether a key-value cache may be filled here: causal attention that takes one."""
    names = set(inspect.signature(module.forward).parameters)
    return bool(names & _CACHES) and bool(getattr(module, "is_causal", True))


def _taken_apart(path: str, module: nn.Module, width: int) -> Submodule:
    """The part of an attention wrapper that computes what is added, without the addition."""
    parts = {n: m for n, m in module.named_children() if any(True for _ in m.parameters())}
    inner = [n for n, m in parts.items() if _is_attention(m) and not _normalises(m, width)]
    others = {n: m for n, m in parts.items() if n not in inner}
    if len(inner) != 1 or not others:
        return Submodule(path, "attention", width, refused=INSIDE)
    start = f"{path}.{inner[0]}"
    if all(is_norm(m) for m in others.values()):
        return Submodule(start, "attention", width)
    if len(others) == 1:
        ((name, output),) = others.items()
        held = {n: m for n, m in output.named_children() if any(True for _ in m.parameters())}
        linears = [n for n, m in held.items() if isinstance(m, nn.Linear)]
        norms = [n for n, m in held.items() if is_norm(m)]
        if len(held) == 2 and len(linears) == len(norms) == 1:
            end = f"{path}.{name}.{linears[0]}"
            return Submodule(start, "attention", width, end=end, adds_input=True)
    return Submodule(path, "attention", width, refused=INSIDE)


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _normalises(module: nn.Module, width: int) -> bool:
    """Whether a norm of the residual's width is inside; one of a head's width does not count."""
    return any(
        is_norm(m) and any(p.numel() == width for p in m.parameters()) for m in module.modules()
    )
