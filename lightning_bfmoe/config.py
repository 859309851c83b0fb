"""`ButterflyMoEConfig`: every setting of the layer and of the swap, with its unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_bfmoe.errors import ConfigError

_CHOICES = {
    "init": ("preserve", "scratch"),
    "scale": ("lstsq", "absmean"),
    "granularity": ("row", "tensor"),
    "down": ("butterfly", "dense"),
}


@dataclass(frozen=True)
class ButterflyMoEConfig:
    """Settings of the ButterflyMoE layers that replace a model's feed-forward blocks.

    Example:
        >>> ButterflyMoEConfig(num_experts=64, top_k=4).angle_std_or_default
        0.02
        >>> ButterflyMoEConfig.preset("paper", num_experts=16).down
        'dense'

    Raises:
        ConfigError: A value is out of range, or `top_k` exceeds `num_experts`.
    """

    num_experts: int = 8
    """Experts per layer (count, >= 1)."""
    top_k: int = 2
    """Experts that each token visits (count, 1 <= top_k <= num_experts)."""
    init: Literal["preserve", "scratch"] = "preserve"
    """`preserve` keeps the weights found in the block; `scratch` draws new ones (for training from
    random weights, where it gave the lower loss: experts must start well apart)."""
    angle_std: float | None = None
    """Standard deviation of the initial angles (radians).

    None: 0.02 with `preserve`, 0.5 with `scratch`."""
    stages: int | None = None
    """Stages per rotation (count). None: all, so that every output depends on every input."""
    gains: bool = False
    """Per-expert diagonal gains, d_in + d_out numbers a matrix and expert."""
    scale: Literal["lstsq", "absmean"] | None = None
    """Ternary scale: exact least squares (ours), or the mean absolute value (BitNet b1.58).

    None: `lstsq` with `preserve`, which it is nearer to; `absmean` with `scratch`, which trained to
    a lower loss at the larger size measured (docs/decisions.md, entry 26)."""
    granularity: Literal["row", "tensor"] = "row"
    """One ternary scale per output row, or one per matrix."""
    down: Literal["butterfly", "dense"] = "butterfly"
    """`dense`: one shared fp32 projection behind the experts, as in the paper's published code."""
    activation_bits: int | None = None
    """Width of the integers that the activations are rounded to, per row, before they enter a
    ternary matrix (bits, 2 to 16; 8 is nearly free). It rises with lambda. None: no rounding."""
    activation: str | None = None
    """Name in `layers.activation`. None: the swapped block's own."""
    dropout: float | None = None
    """Probability on the hidden units. None: the swapped block's own."""
    balance_rate: float | None = None
    """Step of the gradient-free balance bias per optimizer step; 0 turns it off.

    None: 1e-3 with `preserve`, 1e-2 with `scratch`, whose experts part at once. The bias is added
    to sigmoid scores in (0, 1); 1 / balance_rate steps outweigh them."""
    switch_weight: float = 0.0
    """Weight of the Switch load-balance loss (loss units; 0.01 is usual)."""
    z_weight: float = 0.0
    """Weight of the router z-loss (loss units; 0.001 is usual)."""
    router_noise: float = 0.0
    """Standard deviation of the noise on the router's logits in training (logit units)."""
    correction_rank: int = 0
    """Rank of a dense low-rank branch beside the experts, V (U x + c), for all tokens (count).

    0: none. A calibrated swap fits it to what the ternary layer misses; else it starts at zero.
    Blocks that bring their own router have none."""
    seed: int = 0
    """Seed of the layers' own generator; the global generators never move."""

    def __post_init__(self) -> None:
        """Check ranges and fields against each other."""
        for name, choices in _CHOICES.items():
            if name == "scale" and self.scale is None:
                continue
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {choices}",
                    got=f"{name}={getattr(self, name)!r}",
                    fix=f"Use {name}={choices[0]!r}.",
                )
        lows = {"num_experts": 1, "top_k": 1, "stages": 1, "correction_rank": 0, "seed": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if name == "stages" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    f"{name} must be an integer >= {low}",
                    got=f"{name}={value!r}",
                    fix=f"Use {name}={low} or more.",
                )
        bits = self.activation_bits
        if bits is not None and (
            not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16
        ):
            raise ConfigError(
                "activation_bits must be None or an integer from 2 to 16",
                got=f"activation_bits={bits!r}",
                fix="Use activation_bits=8, or None for no quantisation.",
            )
        if self.top_k > self.num_experts:
            raise ConfigError(
                "top_k must be at most num_experts",
                got=f"top_k={self.top_k}, num_experts={self.num_experts}",
                fix=f"Use top_k={self.num_experts} or more experts.",
            )
        for name in ("angle_std", "balance_rate", "switch_weight", "z_weight", "router_noise"):
            value = getattr(self, name)
            if name in ("angle_std", "balance_rate") and value is None:
                continue
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ConfigError(
                    f"{name} must be a finite number >= 0",
                    got=f"{name}={value!r}",
                    fix=f"Use {name}=0.0 to turn it off.",
                )
        if self.dropout is not None and (not _is_number(self.dropout) or not 0 <= self.dropout < 1):
            raise ConfigError(
                "dropout must lie in [0, 1)",
                got=f"dropout={self.dropout!r}",
                fix="Use dropout=None to keep the block's own.",
            )

    @property
    def angle_std_or_default(self) -> float:
        """The standard deviation that is used: `angle_std`, or the default of `init` (radians)."""
        if self.angle_std is not None:
            return float(self.angle_std)
        return 0.02 if self.init == "preserve" else 0.5

    @property
    def scale_or_default(self) -> Literal["lstsq", "absmean"]:
        """The ternary scale that is used: `scale`, or the default of `init`."""
        return self.scale or ("lstsq" if self.init == "preserve" else "absmean")

    @property
    def balance_rate_or_default(self) -> float:
        """The balance step that is used: `balance_rate`, or the default of `init`."""
        if self.balance_rate is not None:
            return float(self.balance_rate)
        return 1e-3 if self.init == "preserve" else 1e-2

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ButterflyMoEConfig:
        """Named settings: `default`, or `paper` (the author's published layer, for comparison).

        `paper` has no activation between the matrices, one rotated ternary matrix and a shared
        dense projection, near-identity angles, absmean scales, logit noise, and no balance
        gradient (the published balance loss carries none).

        Source: arXiv 2601.13563 and its author's code; `default` is ours.
        """
        presets: dict[str, dict[str, Any]] = {
            "default": {},
            "paper": {
                "init": "scratch",
                "angle_std": 0.02,
                "scale": "absmean",
                "down": "dense",
                "activation": "identity",
                "balance_rate": 0.0,
                "router_noise": 0.1,
            },
        }
        if name not in presets:
            raise ConfigError(
                f"preset must be one of {tuple(presets)}", got=repr(name), fix="Use 'default'."
            )
        return cls(**{**presets[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data (JSON-safe)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ButterflyMoEConfig:
        """The inverse of `to_dict`; unknown keys are an error, not ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise ConfigError(
                "a config has only known fields",
                got=f"{unknown}",
                fix=f"Known fields: {sorted(names)}.",
            )
        return cls(**dict(data))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
