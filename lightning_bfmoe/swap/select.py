"""Which candidates are swapped: `include`, `exclude`, and what to say when that is nothing."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.swap.candidate import Candidate, describe_all
from lightning_bfmoe.swap.linears import is_linear
from lightning_bfmoe.swap.recognise import by_structure

Patterns = str | Sequence[str] | None


def select_candidates(
    model: nn.Module,
    candidates: list[Candidate],
    include: Patterns = None,
    exclude: Patterns = None,
) -> list[Candidate]:
    """The candidates that a swap takes.

    Without `include` these are all that are ready. A pattern is a module path, with the wildcards
    of `fnmatch` (``*`` crosses dots) or, after ``re:``, a regular expression for the whole path; it
    may name the block or the slot of the new layer. Blocks that are only swapped by name (output
    and input differ in width, part of a longer chain, a bottleneck) need a path without wildcards,
    or a regular expression.

    Args:
        model: The model that was searched.
        candidates: What `find_feed_forward` returned.
        include: What to take; everything that is ready when None.
        exclude: What to leave, whatever `include` says.

    Returns:
        The chosen candidates, in order; empty when all that was asked for is swapped already.

    Raises:
        SwapError: Nothing matches, a pattern matches nothing, a named block cannot be swapped, its
            weights cannot be read, or two chosen blocks share a matrix.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in _patterns(exclude):
        if not any(_matches(pattern, name) for name in names):
            raise SwapError(
                "an exclude pattern must match a module of the model",
                got=f"exclude={pattern!r}",
                fix=_similar(pattern, names),
            )
    kept = [
        c
        for c in candidates
        if not any(_matches(p, path) for p in _patterns(exclude) for path in c.paths)
    ]
    swapped = [name for name, _ in moe_layers(model)]
    if include is None:
        chosen = [c for c in kept if c.status in ("ready", "unreadable")]
        if not chosen and not swapped:
            raise _nothing_found(candidates, bool(_patterns(exclude)))
    else:
        wanted = {id(c) for p in _patterns(include) for c in _take(model, kept, p, swapped, names)}
        chosen = [c for c in kept if id(c) in wanted]
    _check(chosen)
    return chosen


def _patterns(patterns: Patterns) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else list(patterns or [])
    for pattern in found:
        if not isinstance(pattern, str):
            raise SwapError("include and exclude hold module paths or patterns", got=repr(pattern))
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise SwapError(
                    "a pattern after 're:' must be a regular expression",
                    got=f"{pattern!r} ({error})",
                    fix="Escape dots as '\\.', or leave out 're:' for wildcards.",
                ) from error
    return found


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return pattern == path or fnmatch.fnmatchcase(path, pattern)


def _take(
    model: nn.Module, kept: list[Candidate], pattern: str, swapped: list[str], names: list[str]
) -> list[Candidate]:
    hits = [c for c in kept if any(_matches(pattern, path) for path in c.paths)]
    exact = pattern.startswith("re:") or any(pattern in c.paths for c in hits)
    taken = [
        c for c in hits if c.status in ("ready", "unreadable") or (exact and c.status == "by-name")
    ]
    if taken:
        return taken
    parents = {
        ".".join(path.split(".")[:n]) for path in swapped for n in range(1, path.count(".") + 2)
    }
    if any(_matches(pattern, path) for path in parents):
        return []
    if hits and not exact and any(c.status == "by-name" for c in hits):
        raise SwapError(
            "a wildcard does not take blocks that are only swapped by name",
            got=f"include={pattern!r}, which matches{describe_all(hits)}",
            fix="Write the path without wildcards.",
        )
    if hits:
        raise SwapError(
            "a block that is named must be one that can be swapped",
            got=f"include={pattern!r}:{describe_all(hits)}",
            fix=_TEACH,
        )
    raise SwapError(
        "every include pattern must match a feed-forward block",
        got=f"include={pattern!r}{_explain(model, pattern, names)}",
        fix=f"Blocks that can be named:{describe_all(c for c in kept if c.status != 'rejected')}",
    )


def _explain(model: nn.Module, pattern: str, names: list[str]) -> str:
    """Why a path is no block, when it is a path at all."""
    if pattern not in names:
        return "" if any(ch in pattern for ch in "*?[") else f", and {_similar(pattern, names)}"
    module = model.get_submodule(pattern)
    kind = type(module).__name__
    leaves = [m for m in module.modules() if is_linear(m)]
    if is_linear(module) or len(leaves) < 2:
        return f", a {kind} with {len(leaves)} matrices, where a block has two or three"
    if len(leaves) > 3:
        return f", a {kind} with {len(leaves)} matrices; name a smaller part, or '{pattern}.*'"
    return f", a {kind}: {by_structure(module, leaves).reason}"


def _similar(pattern: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, [n for n in names if n], n=3, cutoff=0.5)
    return f"no module has this path; near it are {near}." if near else "no module has this path."


def _nothing_found(candidates: list[Candidate], excluded: bool) -> SwapError:
    return SwapError(
        "a model that is swapped must have a feed-forward block"
        + (" that is not excluded" if excluded else ""),
        got=f"these candidates:{describe_all(candidates)}\n",
        fix="Name one with include='its.path', or teach it with lightning_bfmoe.register_adapter. "
        "Merge adapters such as LoRA first: a block has two or three matrices. "
        "A model that builds its layers later (setup, configure_model) must be swapped after that.",
    )


def _check(chosen: list[Candidate]) -> None:
    users: dict[int, Candidate] = {}
    for c in chosen:
        if c.status == "unreadable":
            raise SwapError(
                "the weights of a block that is swapped must be readable and finite",
                got=f"block {c.path!r}: {c.reason}",
                fix=f"Or leave the block alone with exclude={c.path!r}.",
            )
        for leaf in c.leaves:
            if (other := users.setdefault(id(leaf), c)) is not c:
                raise SwapError(
                    "blocks that are swapped must not share a matrix",
                    got=f"{other.path!r} and {c.path!r}",
                    fix="Name only one of them.",
                )


_TEACH = "Name another block, or describe this one with lightning_bfmoe.register_adapter."
