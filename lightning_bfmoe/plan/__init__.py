"""Floor 4: when. Pure functions from a step to values, and the parameter groups; no lightning."""

from lightning_bfmoe.plan.groups import GROUP_KEY, split_parameter_groups
from lightning_bfmoe.plan.schedule import Plan, PlanState, plan_at

__all__ = ["GROUP_KEY", "Plan", "PlanState", "plan_at", "split_parameter_groups"]
