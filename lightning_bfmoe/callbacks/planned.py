"""A callback with a plan and a count of finished steps: base of the ones that need both."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bfmoe.callbacks.clock import StepClock
from lightning_bfmoe.callbacks.parts import Part
from lightning_bfmoe.errors import CheckpointError
from lightning_bfmoe.plan import Plan, PlanState, plan_at

_STATE_VERSION = 1


class Planned(Part):
    """Counts optimizer steps, settles the plan when the training starts, and keeps both.

    Args:
        plan: When what holds.
        total_steps: Optimizer steps of the whole training. None: the Trainer's estimate.
        replan: On resume, whether to plan anew when the Trainer's estimate has changed.
        name: Tells several callbacks apart.
    """

    def __init__(
        self,
        plan: Plan,
        total_steps: int | None = None,
        replan: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.total_steps, self.replan, self.name = plan, total_steps, replan, name
        self.clock = StepClock()
        self._leader: Planned | None = None
        self._restored = False

    def follow(self, leader: "Planned") -> None:
        """Go by the plan and the count of another callback, which keeps them for both."""
        self._leader, self.plan, self.clock = leader, leader.plan, leader.clock

    @property
    def now(self) -> PlanState:
        """What the plan says for the next optimizer step.

        Raises:
            ConfigError: The plan is in fractions and the training has not begun.
        """
        return plan_at(self.clock.step, self.clock.total, self.plan)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restored = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leader is None:
            self.clock.start_with(trainer, self.state_key if not self._restored else None)
            self.clock.make_plan(trainer, self.plan, self.total_steps, self.replan)

    def count(self, trainer: pl.Trainer) -> bool:
        """After a batch: whether it finished an optimizer step. A follower does not count."""
        return self._leader is None and self.clock.tick(trainer.global_step)

    # State: plain data, so that `torch.load(weights_only=True)` reads it.

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "name": self.name,
            "plan": self.plan.to_dict(),
            **self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"the callback's state has version {_STATE_VERSION}",
                got=state_dict.get("version"),
                fix="Resume with the library version that wrote the checkpoint.",
            )
        self._restored = True
        if self._leader is not None:
            return
        stored = state_dict["plan"]
        if {**Plan().to_dict(), **stored} != self.plan.to_dict():
            rank_zero_warn(f"The checkpoint was trained with {stored}; going on with {self.plan}.")
        self.clock.load_state_dict(state_dict)
