"""Logging only where somebody reads."""

import lightning.pytorch as pl
import torch
from torch import Tensor


def log_value(
    trainer: pl.Trainer, module: pl.LightningModule, owner: str | None, name: str, value: object
) -> None:
    """Log ``bfmoe/name``, or ``bfmoe/owner/name``, when it gets anywhere.

    Args:
        trainer: Where it is logged.
        module: Logs it.
        owner: Name of the callback, when it has one.
        name: Name of the value.
        value: A number or a 0-d tensor; None is not logged.
    """
    full = f"bfmoe/{name}" if owner is None else f"bfmoe/{owner}/{name}"
    if value is not None and somebody_reads(trainer, full):
        module.log(full, value if isinstance(value, Tensor) else torch.as_tensor(value))


def somebody_reads(trainer: pl.Trainer, name: str) -> bool:
    """Whether a logged value gets anywhere: to a logger, or to a callback that monitors it."""
    if trainer.barebones:
        return False
    monitors = (getattr(c, "monitor", None) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(trainer.loggers) or name in monitors
