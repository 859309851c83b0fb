"""`TernarySchedule`: lambda of ButterflyMoE layers by the plan, for models swapped by hand."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.callbacks.logs import log_value
from lightning_bfmoe.callbacks.planned import Planned
from lightning_bfmoe.callbacks.settings import resolve_plan
from lightning_bfmoe.plan import Plan


class TernarySchedule(Planned):
    """Drives lambda of all ButterflyMoE layers of a module: from latent weights to ternary ones.

    For models that were swapped with `swap_feed_forward`; `ButterflyMoECallback` holds one. Of the
    plan it reads `start`, `end` and `shape`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> schedule = TernarySchedule(plan={"start": 0, "end": 1000}, evaluate_ternary=True)
        >>> trainer = Trainer(callbacks=[schedule], logger=False)

    Args:
        plan: When the weights become ternary; ``Plan()`` when None.
        total_steps: Optimizer steps of the whole training. None: the Trainer's estimate.
        replan: On resume, whether to plan anew when the Trainer's estimate has changed. False keeps
            the planned total of the checkpoint.
        evaluate_ternary: Validate, test and predict at lambda 1, as the packed model computes.
        name: Tells several callbacks apart, in checkpoints and in logged names.

    Raises:
        ConfigError: The plan is out of range; when fitting, no layers or a second driver of them.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        *,
        total_steps: int | None = None,
        replan: bool = False,
        evaluate_ternary: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(resolve_plan(plan), total_steps, replan, name)
        self.evaluate_ternary = evaluate_ternary
        self._driven: list[Any] | None = None
        self._put_back: Callable[[], None] = _nothing

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_alone(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._let_go()
        self._driven = self._with_twins(trainer, pl_module)
        set_blends(self._driven, self.now.blend)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._driven is not None:
            set_blends(self._driven, self.now.blend)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        blend = self.now.blend
        if self._driven is None or not self.count(trainer):
            return
        log_value(trainer, pl_module, self.name, "blend", blend)
        set_blends(self._driven, self.now.blend)  # what a checkpoint saved now shall hold

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (blend := self.now.blend) < 1:
            total = self.clock.total
            planned = f"{total} planned steps" if total else f"the plan's {self.plan.end} steps"
            rank_zero_warn(
                f"The training ended at lambda {blend:.3f}, after {self.clock.step} of {planned}: "
                "the weights are not ternary yet and pack() refuses them. Train on, or give the "
                "callback as total_steps=... the optimizer steps that this training takes (with "
                "manual optimisation they cannot be foreseen).",
                stacklevel=2,
            )

    # Validation, test, prediction: lambda of the step, or of the checkpoint, or 1 when asked.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = self._with_twins(trainer, pl_module)
        if trainer.state.fn == "fit" and self.clock.total is not None:
            set_blends(layers, self.now.blend)
        if self.evaluate_ternary:
            self._put_back = _lend(layers, 1.0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()
        self._put_back = _nothing

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    def _with_twins(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
        """The layers, and their twins in averaged copies of the model."""
        models = (module, *guards.averaged_copies(trainer))
        return [layer for model in models for layer in self.layers(model)]

    def _let_go(self) -> None:
        self._put_back()
        self._driven, self._put_back = None, _nothing

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to modules behind when copied or pickled."""
        return {**self.__dict__, "_driven": None, "_put_back": _nothing}


def set_blends(layers: list[Any], value: float) -> None:
    """Set lambda of layers."""
    for layer in layers:
        layer.set_blend(value)


def _lend(layers: list[Any], value: float) -> Callable[[], None]:
    """Set lambda of layers; returns what puts back the present ones."""
    before = [(layer, float(layer.blend)) for layer in layers]
    set_blends(layers, value)

    def put_back() -> None:
        for layer, blend in before:
            layer.set_blend(blend)

    return put_back


def _nothing() -> None:
    """What there is to put back outside of an evaluation."""
