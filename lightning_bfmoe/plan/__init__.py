"""Floor 4: when. Pure functions from a step to values, and the parameter groups; no lightning."""

from lightning_bfmoe.plan.groups import GROUP_KEY, check_factor, split_parameter_groups
from lightning_bfmoe.plan.schedule import Plan, PlanState, plan_at

__all__ = ["GROUP_KEY", "Plan", "PlanState", "check_factor", "plan_at", "split_parameter_groups"]
