"""Configurations to plan for."""

from dense2conv.planner import PlanConfig


def plan_config(changes: dict[str, object] | None = None) -> PlanConfig:
    """The defaults with some keys changed."""
    config = PlanConfig()
    for key, value in (changes or {}).items():
        owner, (*path, name) = config, key.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config
