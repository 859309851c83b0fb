"""Which implementation of an op runs: one table, an explanation, and an off switch.

A missing or switched-off kernel changes the speed, never the function.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_bfmoe.errors import ConfigError


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op."""

    op: str
    name: str
    run: Callable[..., Any]
    suits: Callable[..., bool]
    """Whether this kernel is the one to take for these arguments."""
    why: str
    """When `suits` says yes, in words."""
    widens: bool = False
    """Takes 16-bit rows as they are and widens inside; else the caller widens them first."""
    missing: Callable[[], str] = str
    """Why it cannot run in this installation; empty when it can."""


_TABLE: dict[str, list[Kernel]] = {}
_FORCED: dict[str, str] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel; of several that suit, the one registered last runs.

    The first kernel of an op is its reference and suits everything.
    """
    _TABLE.setdefault(kernel.op, []).append(kernel)


def kernels(op: str | None = None) -> list[Kernel]:
    """All kernels, or those of one op, reference first."""
    return [k for name, ks in _TABLE.items() if op in (None, name) for k in ks]


def choose(op: str, *args: Any) -> Kernel:
    """The kernel that runs for these arguments."""
    forced = _FORCED.get(op)
    for kernel in reversed(_TABLE[op]):
        if kernel.name == forced or (forced is None and kernel.suits(*args)):
            return kernel
    return _TABLE[op][0]


def describe() -> str:
    """A line per kernel: op, name, when it runs, whether it is forced, or why it cannot run.

    Example:
        >>> import lightning_bfmoe.kernels
        >>> "rotate" in lightning_bfmoe.kernels.describe()
        True
    """
    lines = []
    for kernel in kernels():
        forced = "  [forced]" if _FORCED.get(kernel.op) == kernel.name else ""
        missing = kernel.missing()
        note = f"  [cannot run: {missing}]" if missing else forced
        lines.append(f"{kernel.op:8} {kernel.name:10} {kernel.why}{note}")
    return "\n".join(lines)


@contextlib.contextmanager
def use_kernel(op: str, name: str) -> Iterator[None]:
    """Force one implementation of an op inside the `with` block (for tests and benchmarks).

    Raises:
        ConfigError: No such op or kernel, or this installation cannot run it.
    """
    names = [k.name for k in kernels(op)]
    if name not in names:
        raise ConfigError(
            f"the kernels of {op!r} are {names}",
            got=repr(name),
            fix="See lightning_bfmoe.kernels.describe().",
        )
    missing = next(k for k in kernels(op) if k.name == name).missing()
    if missing:
        raise ConfigError(
            f"the kernel {name!r} cannot run in this installation",
            got=missing,
            fix="See lightning_bfmoe.kernels.describe().",
        )
    before = _FORCED.get(op)
    _FORCED[op] = name
    try:
        yield
    finally:
        if before is None:
            _FORCED.pop(op, None)
        else:
            _FORCED[op] = before
