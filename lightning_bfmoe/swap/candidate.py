"""A place in a model where a feed-forward block was found, or was looked for in vain."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_bfmoe.layers.surgery import ReplacementPlan, Scalar
from lightning_bfmoe.swap.blocks import FeedForward

Status = Literal["ready", "by-name", "rejected", "unreadable"]


@dataclass
class Candidate:
    """One feed-forward block of a model, recognised or refused.

    Example:
        >>> from lightning_bfmoe.swap import find_feed_forward
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> [(c.path, c.status, c.block.d_ff) for c in find_feed_forward(model)]
        [('0', 'ready', 32)]

    Args:
        module: The module that forms the block, or in which it stands.
        family: Which recogniser spoke: "structure", "sequential", "experts", "expert-list", or an
            adapter's name.
        owner: Dotted path of `module` in the model.
        layer_at: Slot of the new layer inside `module`; "" replaces the module itself.
        identities: Slots inside `module` that become x -> x.
        attributes: Settings inside `module`.
        outer: Settings of the modules around it.
        status: "ready" will be swapped; "by-name" only when `include` names it without a wildcard;
            "rejected" is no feed-forward block; "unreadable" has weights that cannot be read.
        reason: Why it is not "ready".
        block: Matrices, activation and dropout; the mean of all experts for expert blocks.
        experts: The single experts of an expert block, whose own router is kept.
        call: The original as a function of one tensor, for measuring; None when there is none.
        leaves: The modules whose weights the block uses.
        placement: How the new layer is put in, with paths from the model's root.
    """

    module: nn.Module
    family: str
    owner: str = ""
    layer_at: str = ""
    identities: list[str] = field(default_factory=list)
    attributes: dict[str, Scalar] = field(default_factory=dict)
    outer: dict[str, Scalar] = field(default_factory=dict)
    status: Status = "rejected"
    reason: str = ""
    block: FeedForward | None = None
    experts: list[FeedForward] = field(default_factory=list)
    call: Callable[[Tensor], Tensor] | None = None
    leaves: list[nn.Module] = field(default_factory=list)
    placement: ReplacementPlan | None = None

    @property
    def path(self) -> str:
        """Dotted path at which the new layer will stand."""
        return join(self.owner, self.layer_at)

    @property
    def paths(self) -> list[str]:
        """All paths that name this block: its slots, shared ones too, and its owner."""
        aliases = self.placement["aliases"] if self.placement else []
        return list(dict.fromkeys([self.path, self.owner, *aliases]))

    @property
    def shape(self) -> str:
        """The block's widths in words."""
        if self.block is None:
            return ""
        widths = f"{self.block.d_model} -> {self.block.d_ff} -> {self.block.d_out}"
        return f"{len(self.experts)} x {widths}" if self.experts else widths

    def refuse(self, reason: str, status: Status = "rejected") -> "Candidate":
        """Marks the candidate as not swappable; returns it."""
        self.status, self.reason = status, reason
        return self

    def describe(self) -> str:
        """One line for a list of candidates."""
        inside = "" if self.path == self.owner else f" in {self.owner or 'the model'}"
        text = f"{self.path or '(the model itself)'} ({type(self.module).__name__}{inside})"
        text += f" {self.shape}" if self.shape else ""
        return f"{text}: {self.status}" + (f", {self.reason}" if self.reason else "")


def join(*parts: str) -> str:
    """A dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def describe_all(candidates: Iterable[Candidate], limit: int = 20) -> str:
    """Candidates line by line, those with the same class and reason once."""
    groups: dict[tuple[str, str, str], list[Candidate]] = {}
    for c in candidates:
        groups.setdefault((type(c.module).__name__, c.status, c.reason), []).append(c)
    lines = [
        same[0].describe() + (f" [and {len(same) - 1} more like it]" if len(same) > 1 else "")
        for same in groups.values()
    ]
    if len(lines) > limit:
        lines = [*lines[:limit], f"... and {len(lines) - limit} kinds more"]
    return "".join(f"\n  - {line}" for line in lines) or " none"
