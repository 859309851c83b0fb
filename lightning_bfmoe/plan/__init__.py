"""Floor 4: when. Pure functions from a step to values, and the parameter groups; no lightning."""

from lightning_bfmoe.plan.groups import GROUP_KEY, check_factor, holds, split_parameter_groups
from lightning_bfmoe.plan.schedule import Plan, PlanState, plan_at
from lightning_bfmoe.plan.steps import StepScale, scale_steps

__all__ = [
    "GROUP_KEY",
    "Plan",
    "PlanState",
    "StepScale",
    "check_factor",
    "holds",
    "plan_at",
    "scale_steps",
    "split_parameter_groups",
]
