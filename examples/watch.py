"""Lightning callbacks of the quickstart: one remembers, one moves the lambda of the controls."""

import time
from typing import Any

import lightning as L
import torch
from torch import nn

from examples.controls import StandardMoE, set_blend
from lightning_bfmoe.plan import Plan, plan_at


class History(L.Callback):
    """Keeps what the figure shows, per optimizer step; plain numbers, ready for JSON.

    ``train_loss`` (nats), ``blend`` (lambda; None where nothing is ternary) and ``load`` (for each
    expert of the last layer its share of the token slots, 1 when even; None for a dense model).
    ``seconds`` is how long the training took, with ``threads`` threads.
    """

    def __init__(self) -> None:
        self.train_loss: list[float] = []
        self.blend: list[float | None] = []
        self.load: list[list[float] | None] = []
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the step that has just been taken."""
        self.train_loss.append(float(trainer.callback_metrics["train_loss"]))
        feed_forward = pl_module.blocks[-1].mlp
        self.blend.append(_blend(feed_forward))
        self.load.append(_load(feed_forward))

    def record(self) -> dict[str, Any]:
        """All of it."""
        return {
            "train_loss": self.train_loss,
            "blend": self.blend,
            "load": self.load,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
        }


class BlendRamp(L.Callback):
    """Moves lambda of the controls by the plan that ButterflyMoE follows.

    Args:
        plan: When the weights become ternary.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set lambda for the step to come."""
        steps = trainer.estimated_stepping_batches
        set_blend(pl_module, plan_at(trainer.global_step, steps, self.plan).blend)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is written is ternary."""
        set_blend(pl_module, 1.0)


def _blend(module: nn.Module) -> float | None:
    if isinstance(module, StandardMoE) and not module.ternary:
        return None
    return getattr(module, "blend", None)


def _load(module: nn.Module) -> list[float] | None:
    routing = getattr(module, "last_routing", None)
    counts = routing.load if routing is not None else getattr(module, "load", None)
    if counts is None:
        return None
    return (counts * len(counts) / counts.sum()).tolist()
