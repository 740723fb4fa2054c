"""Memory, traffic and time of a run on a cluster, before it is launched."""

from dense2conv.planner.config import ClusterConfig, PlanConfig
from dense2conv.planner.plan import Estimate, Plan, make_plan
from dense2conv.planner.rehearsal import rehearsal_lines, rehearse
from dense2conv.planner.shortage import is_out_of_memory, shortage
from dense2conv.planner.text import as_json, table

__all__ = [
    "ClusterConfig",
    "Estimate",
    "Plan",
    "PlanConfig",
    "as_json",
    "is_out_of_memory",
    "make_plan",
    "rehearsal_lines",
    "rehearse",
    "shortage",
    "table",
]
