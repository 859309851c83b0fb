"""`RouterBalance`: moves the balance bias, and scales the routers' own losses like the user's."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.callbacks.logs import log_value
from lightning_bfmoe.callbacks.parts import Part
from lightning_bfmoe.layers import TopKRouter, balance_together, routers


class RouterBalance(Part):
    """Balances the routing of all ButterflyMoE layers of a module, in any training.

    Once an optimizer step the loads are summed over accumulated batches and over all processes, and
    every balance bias moves. In each backward pass the routers' own losses get the factor that the
    user's loss got. For models that were swapped by hand; `ButterflyMoECallback` holds one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RouterBalance()], logger=False)

    Args:
        name: Tells several callbacks apart, in logged names.

    Raises:
        ConfigError: When fitting, no layers or a second driver of them.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._clock = StepClock()
        self._routers: list[TopKRouter] | None = None
        self._own_losses = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_alone(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start(trainer.global_step)
        found = [router for layer in self.layers(pl_module) for _, router in routers(layer)]
        self._own_losses = any(r.switch_weight > 0 or r.z_weight > 0 for r in found)
        self._routers = found

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._routers is not None and self._own_losses:
            scale = root_loss_scale(trainer, loss.device)
            for router in self._routers:
                router.set_loss_scale(scale)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._routers is None or not self._clock.tick(trainer.global_step):
            return
        loads = [router.pending_load for router in self._routers]
        _sum_over_processes(trainer, loads)
        log_value(trainer, pl_module, self.name, "load_max_over_mean", _imbalance(loads))
        balance_together(self._routers)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._routers = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._routers = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to modules behind when copied or pickled."""
        return {**self.__dict__, "_routers": None}


def root_loss_scale(trainer: pl.Trainer, device: torch.device) -> float | Tensor:
    """By what the user's loss is multiplied before its backward pass.

    Automatic optimisation divides it by the accumulated batches (manual optimisation leaves that
    to the user), and a GradScaler multiplies it; its scale stays on the device, so nothing waits.
    """
    automatic = trainer.lightning_module.automatic_optimization
    share = 1.0 / trainer.accumulate_grad_batches if automatic else 1.0
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return share
    return scaler.scale(torch.full((), share, device=device))


def _sum_over_processes(trainer: pl.Trainer, loads: list[Tensor]) -> None:
    """Sum the loads over all processes, in one call, so that every rank moves alike."""
    if trainer.world_size > 1 and loads:
        total = trainer.strategy.reduce(torch.cat(loads), reduce_op="sum")
        for load, part in zip(loads, total.split([len(x) for x in loads]), strict=True):
            load.copy_(part)


def _imbalance(loads: list[Tensor]) -> Tensor | None:
    """Load of the fullest expert over the mean, averaged over layers; 1 is perfect."""
    ratios = [load.max() / load.float().mean().clamp(min=1e-9) for load in loads]
    return torch.stack(ratios).mean() if ratios else None
