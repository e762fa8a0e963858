"""Plans for tests that need groups and no model."""

from __future__ import annotations

from gapfx.plan import Group, Plan, Weight


def plan_of(num_groups: int) -> Plan:
    """Groups of one weight each, at sparsity 0.8, without phases."""
    return Plan(tuple(Group(f"g{i}", (Weight(f"layer{i}.weight", (4, 5), 0.8),)) for i in range(num_groups)))
