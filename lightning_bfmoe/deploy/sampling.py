"""How the next token is chosen: settings of one request, and the choice for a batch of them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bfmoe.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings of one continuation.

    A row draws from a generator of its own, on the CPU: what it says depends on its seed alone, not
    on the rows beside it, nor on the device (where logits round alike).

    Example:
        >>> Sampling(max_new_tokens=3, temperature=0.0).temperature
        0.0

    Raises:
        ConfigError: A setting is out of range.
    """

    max_new_tokens: int | None = None
    """Tokens to add (count); None: until the context is full."""
    temperature: float = 0.8
    """Divides the logits, >= 0; 0 takes the most likely token."""
    top_k: int | None = 40
    """Choose among so many of the likeliest tokens; None: all."""
    top_p: float = 1.0
    """Choose among the likeliest that together have this probability, in (0, 1]."""
    stop: Collection[int] = ()
    """Ids that end the text; they are not part of it."""
    seed: int = 0
    """Seed of the row's generator."""

    def __post_init__(self) -> None:
        count = (self.max_new_tokens, self.top_k)
        for name, value in zip(("max_new_tokens", "top_k"), count, strict=True):
            if value is not None and (not _is_int(value) or value < 1):
                _refuse(f"{name} is a count >= 1, or None", name, value)
        for name, low, high in (("temperature", 0.0, math.inf), ("top_p", 1e-6, 1.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                _refuse(f"{name} is a finite number in its range", name, value)
        if not _is_int(self.seed) or not 0 <= self.seed < 1 << 63:
            _refuse("seed is an integer in [0, 2**63)", "seed", self.seed)
        if not all(_is_int(token) for token in self.stop):  # nor is it text
            _refuse("stop is a collection of token ids", "stop", self.stop)


class Chooser:
    """Chooses the next token of each row; the settings stand on the device from the start.

    Args:
        settings: One per row.
        steps: Most tokens that are chosen.
        device: Of the logits.
    """

    def __init__(
        self, settings: Sequence[Sampling], steps: int, device: torch.device | str
    ) -> None:
        self.greedy = all(s.temperature == 0 for s in settings)
        if self.greedy:
            return
        kept = [s.top_k for s in settings]
        self._widest = None if None in kept else max(k for k in kept if k is not None)
        draws = [
            torch.rand(steps, generator=torch.Generator().manual_seed(s.seed), dtype=torch.float64)
            for s in settings
        ]
        self._draws = torch.stack(draws).to(device)  # (rows, steps)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).unsqueeze(1).to(device)  # (rows, 1)

        # nearly 0: the division stays finite, and the likeliest token has all the probability
        self._temperature = column([max(s.temperature, 1e-6) for s in settings])
        self._top_k = column([math.inf if k is None else float(k) for k in kept])
        self._top_p = column([s.top_p if s.temperature > 0 else 1e-6 for s in settings])

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """The next token of each row.

        Args:
            logits: (rows, vocabulary).
            step: Number of the choice, from 0 on.

        Returns:
            (rows,) int64; -1 where the logits are NaN or infinite.
        """
        if self.greedy:
            best, token = logits.max(dim=-1)
            return torch.where(best.isfinite(), token, -1)
        vocabulary = logits.shape[-1]
        width = vocabulary if self._widest is None else min(self._widest, vocabulary)
        best, ids = logits.topk(width, dim=-1)  # (rows, width), likeliest first
        scores = (best.double() - best[:, :1].double()) / self._temperature
        rank = torch.arange(width, device=logits.device)
        scores = scores.masked_fill(rank >= self._top_k, -math.inf)
        probs = scores.softmax(dim=-1)
        sums = probs.cumsum(dim=-1)
        probs = torch.where(sums - probs < self._top_p, probs, 0.0)  # the first is always kept
        sums = probs.cumsum(dim=-1)
        target = self._draws[:, step : step + 1] * sums[:, -1:]
        place = (sums <= target).sum(dim=-1, keepdim=True).clamp(max=width - 1)
        token = ids.gather(1, place).squeeze(1)
        return torch.where(best[:, 0].isfinite(), token, -1)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(rule: str, name: str, value: object) -> None:
    raise ConfigError(rule, got=f"{name}={value!r}", fix="See lightning_bfmoe.deploy.Sampling.")
