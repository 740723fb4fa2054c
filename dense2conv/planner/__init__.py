"""Memory, traffic and time of a run on a cluster, before it is launched."""

from dense2conv.planner.config import ClusterConfig, PlanConfig
from dense2conv.planner.plan import Estimate, Plan, make_plan
from dense2conv.planner.text import as_json, table

__all__ = ["ClusterConfig", "Estimate", "Plan", "PlanConfig", "as_json", "make_plan", "table"]
