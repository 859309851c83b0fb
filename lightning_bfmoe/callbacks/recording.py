"""What the recording callbacks share: when to record, which modules, how ranks and logs see it."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.errors import ConfigError

Module = TypeVar("Module")


class Interval:
    """Says during which optimizer steps to record: every n-th, and the first of each training.

    The n-th step is the one that Lightning itself logs with ``log_every_n_steps=n``. The first one
    gives a `ModelCheckpoint(monitor=...)` its key from the start.

    Example:
        >>> interval = Interval(3)
        >>> interval.start(global_step=0)
        >>> due = []
        >>> for step in range(1, 7):
        ...     due.append(interval.is_due)
        ...     _ = interval.tick(global_step=step)
        >>> due
        [True, False, True, False, False, True]

    Args:
        every: Optimizer steps (count, >= 1).

    Raises:
        ConfigError: `every` is out of range.
    """

    def __init__(self, every: int) -> None:
        check_count("every_n_steps", every)
        self.every, self.clock = every, StepClock()
        self.is_first = True
        """Whether no step was finished since the training started or went on."""
        self._restored = False

    @property
    def is_full(self) -> bool:
        """Whether the step that runs now completes an interval."""
        return (self.clock.step + 1) % self.every == 0

    @property
    def is_due(self) -> bool:
        """Whether to record during the step that runs now."""
        return self.is_first or self.is_full

    def start(self, global_step: int) -> None:
        """Begin at step 0, or go on after a checkpoint was loaded."""
        if global_step == 0 and not self._restored:
            self.clock.reset()
        self.clock.start(global_step)
        self.is_first, self._restored = True, False

    def tick(self, global_step: int) -> bool:
        """Take note of the Trainer's counter after a batch; True when a step was finished."""
        finished = self.clock.tick(global_step)
        self.is_first = self.is_first and not finished
        return finished

    def load(self, step: int) -> None:
        """Go on from a checkpoint's step."""
        self.clock.step, self._restored = step, True


def gather_ranks(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The tensors of all ranks, (ranks, *shape), by one collective; none with a single process."""
    if trainer.world_size == 1:
        return tensor.unsqueeze(0)
    gathered: Tensor = trainer.strategy.all_gather(tensor)
    return gathered.reshape(-1, *tensor.shape)


def log_values(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Hand values that are the same on every rank to the loggers, and to whoever monitors them.

    As Lightning's `LearningRateMonitor` does it. `LightningModule.log` takes about 0.3 ms a value,
    each time, and repeats the value at every later step that the loggers see.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=_logged_step(trainer))
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def log_histogram(trainer: pl.Trainer, name: str, counts: Sequence[int]) -> None:
    """Hand the loggers that have TensorBoard's `add_histogram_raw` a histogram over 0, 1, 2, ..."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        add = getattr(getattr(logger, "experiment", None), "add_histogram_raw", None)
        if add is None:
            continue
        add(
            name, min=0, max=len(counts) - 1, num=sum(counts),
            sum=sum(i * n for i, n in enumerate(counts)),
            sum_squares=sum(i * i * n for i, n in enumerate(counts)),
            bucket_limits=[i + 0.5 for i in range(len(counts))], bucket_counts=list(counts),
            global_step=_logged_step(trainer),
        )  # fmt: skip


def _logged_step(trainer: pl.Trainer) -> int:
    """The place on the loggers' axis of steps, where Lightning puts its own values."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def select(
    found: Iterable[tuple[str, Module]], patterns: str | Iterable[str] | None, what: str
) -> list[tuple[str, Module]]:
    """Those whose path fits a pattern (`fnmatch`); all of them when `patterns` is None.

    Raises:
        ConfigError: None fits.
    """
    everything = list(found)
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if wanted is not None:
        wanted = list(wanted)
        chosen = [(n, m) for n, m in everything if any(fnmatchcase(n, p) for p in wanted)]
    else:
        chosen = everything
    if not chosen:
        names = [name for name, _ in everything]
        raise ConfigError(
            f"there must be {what} to record" + (f" that fits {wanted}" if wanted else ""),
            got=f"{len(names)} of them{': ' if names else ''}{', '.join(names[:8])}",
            fix="Correct the pattern, or swap the model's blocks first (ButterflyMoECallback).",
        )
    return chosen


def check_count(name: str, value: object) -> None:
    """Raise unless a setting is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name} must be an integer >= 1", got=f"{name}={value!r}", fix=f"Use {name}=1 or more."
        )
