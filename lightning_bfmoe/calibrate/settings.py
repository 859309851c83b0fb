"""`Calibration`: how activations are collected and what is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lightning_bfmoe.calibrate.batches import ForwardFn, MaskFn
from lightning_bfmoe.calibrate.matrix import Recipe
from lightning_bfmoe.calibrate.orbit import BASES
from lightning_bfmoe.errors import ConfigError

_SHARE = 0.25  # of the model's bytes; with the closed forms' own matrices it stays below one model
_FLOOR = 128 * 2**20


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibrated swap.

    Example:
        >>> Calibration(max_batches=64, sequential=True).held_out
        0.2

    Raises:
        ConfigError: A value is out of range.
    """

    max_batches: int | None = 32
    """Batches a pass (count). None: all that the data has."""
    held_out: float = 0.2
    """Share of the batches that choose among candidates instead of being fitted to."""
    forward_fn: ForwardFn | None = None
    """``(model, batch)``, runs one batch. None: ``model(**batch)`` or the batch's first part."""
    mask_fn: MaskFn | None = None
    """Mask of a batch's tokens that count. None: its `attention_mask`, if it has one."""
    sequential: bool = False
    """Whether a group of blocks sees what the groups before it have become (twice the passes)."""
    group: int | None = None
    """Blocks whose moments are held at once (count). None: as many as fit into `memory`."""
    memory: int | None = None
    """Bytes for moments. None: a quarter of the model's, at least 128 MiB."""
    router: Literal["random", "clusters"] = "random"
    """How routers start: as they were drawn, or from clusters of what they will route."""
    progress: bool = True
    """Whether a progress bar is shown."""
    recipe: Recipe = field(default_factory=Recipe)
    """Settings of the closed forms."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.router not in ("random", "clusters"):
            raise ConfigError(
                "router must be 'random' or 'clusters'",
                got=repr(self.router),
                fix="Use router='random'.",
            )
        if self.group is not None and self.group < 1:
            raise ConfigError("group must be at least 1", got=self.group, fix="Use group=None.")
        strangers = sorted(set(self.recipe.bases) - set(BASES))
        if strangers or not self.recipe.bases:
            raise ConfigError(
                f"recipe.bases names some of {tuple(BASES)}",
                got=self.recipe.bases,
                fix="Use bases=('identity', 'hadamard').",
            )

    def budget(self, model: nn.Module) -> int:
        """Bytes for moments while this model is calibrated."""
        if self.memory is not None:
            return self.memory
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return max(_FLOOR, int(_SHARE * size))


def moment_bytes(settings: Mapping[str, int]) -> int:
    """Bytes that one block's moments, mean expert and latents take while it is calibrated.

    Sums for the fit are double, for the judge float32.

    Args:
        settings: Of the layer: d_model, d_ff, d_out, gated, correction_rank.
    """
    d, f, out = settings["d_model"], settings["d_ff"], settings["d_out"]
    matrices = 2 if settings["gated"] else 1
    latents = matrices * d * f + out * f
    seen = f + (d if settings.get("correction_rank") else 0)
    return 12 * (d * d + seen * seen + out * seen) + 4 * (matrices * d * f + latents)
