"""Counting optimizer steps, and how many there will be.

`Trainer.global_step` counts every optimizer: with two of them under manual optimisation it runs
twice as fast as the batches. So one step here is one batch in which `global_step` advanced.
"""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bfmoe.plan import Plan


class StepClock:
    """Finished steps, planned steps, and whether a batch has just finished a step.

    Example:
        >>> clock = StepClock()
        >>> [clock.tick(global_step) for global_step in (0, 1, 1, 3)]
        [False, True, False, True]
        >>> clock.step
        2
    """

    def __init__(self) -> None:
        self.step = 0
        """Finished steps (count)."""
        self.total: float | None = None
        """Planned steps of the whole training; None until it is known."""
        self._seen = 0

    def start(self, global_step: int) -> None:
        """Begin (or go on) counting from the Trainer's present counter."""
        self._seen = global_step

    def reset(self) -> None:
        """Forget step and total: a new training."""
        self.step, self.total = 0, None

    def start_with(self, trainer: pl.Trainer, stateless: str | None = None) -> None:
        """Begin with a Trainer's training, or go on where its checkpoint stopped.

        Args:
            trainer: At the start of its training.
            stateless: Key under which the checkpoint holds no state; None when it was restored.
        """
        if stateless is not None and trainer.global_step == 0:
            self.reset()
        elif stateless is not None and trainer.ckpt_path is not None:
            self.step = trainer.global_step
            rank_zero_warn(
                f"The checkpoint holds no state of {stateless}: its plan goes on from step "
                f"{trainer.global_step}. Was the callback's name changed?"
            )
        self.start(trainer.global_step)

    def make_plan(
        self, trainer: pl.Trainer, plan: Plan, total_steps: int | None, replan: bool
    ) -> None:
        """Settle the total, unless an earlier part of this training has done so.

        Raises:
            ConfigError: The plan needs a total and nobody knows it.
        """
        if plan.is_absolute and total_steps is None:
            self.total = self.total or 0
            return
        estimate = total_steps if total_steps is not None else planned_steps(trainer)
        if self.total and self.total != estimate and not replan:
            rank_zero_warn(
                f"This training was planned for {self.total} steps and would now take {estimate}: "
                f"going on with {self.total}; replan=True plans anew."
            )
            return
        plan.steps(estimate)  # an unknown length is refused here
        self.total = int(estimate)

    def tick(self, global_step: int) -> bool:
        """Take note of the Trainer's counter after a batch; True when a step was finished."""
        finished = global_step > self._seen
        self._seen = global_step
        self.step += finished
        return finished

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"step": self.step, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step, self.total = int(state["step"]), state["total"]


def planned_steps(trainer: pl.Trainer) -> float:
    """Steps that a training will take; -1 or infinite when nobody knows.

    With several optimizers under manual optimisation `max_steps` counts the steps of all of them;
    each is taken to step once a batch.
    """
    estimate = trainer.estimated_stepping_batches
    manual = not trainer.lightning_module.automatic_optimization
    if manual and len(trainer.optimizers) > 1 and trainer.max_steps > 0:
        by_steps = math.ceil(trainer.max_steps / len(trainer.optimizers))
        return by_steps if estimate < 0 else min(estimate, by_steps)
    return estimate
