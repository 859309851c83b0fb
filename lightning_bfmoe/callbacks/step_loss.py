"""The training loss of a batch, as the user's `training_step` returned it."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor


def step_loss(trainer: pl.Trainer, module: pl.LightningModule, outputs: Any) -> Tensor | None:
    """The loss of a batch, 0-d float32 and detached, still on its device; None when there is none.

    Lightning hands callbacks the loss divided by the accumulated batches; that is taken back.

    Args:
        trainer: Whose training it is.
        module: The module that is trained.
        outputs: What `on_train_batch_end` got.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    batches = trainer.accumulate_grad_batches if module.automatic_optimization else 1
    return loss.detach().float().reshape(()) * batches
