"""The phase table of a plan, by a method and a budget: phases tile the steps of a run.

With the same budget every method but `pgap`, whose phases train several models side by side, has the same number of
steps, so that methods can be compared at equal epochs. The methods are in gapfx.schedules.
"""

from __future__ import annotations

import dataclasses

from gapfx.budget import Budget as Budget
from gapfx.budget import Schedule as Schedule
from gapfx.errors import UserError
from gapfx.plan import Plan
from gapfx.schedules import SCHEDULES as SCHEDULES


def with_schedule(plan: Plan, method: str, budget: Budget) -> Plan:
    """A new plan with the phase table of `method`, in the place of the phases that it had.

    Raises UserError for an unknown method, a plan without groups, an empty budget, and one that the method cannot use.
    """
    maker = SCHEDULES[method]
    if not plan.groups:
        raise UserError("the plan has no groups", fix="`gapfx plan TASK` shows why each weight stays dense")
    if (
        budget.rounds < 1
        or budget.phase_steps < 1
        or budget.finetune_steps < 0
        or budget.update_steps < 1
        or budget.landing < 1
    ):
        raise UserError(
            f"no schedule of {budget.rounds} rounds, {budget.phase_steps} steps a phase, "
            f"{budget.finetune_steps} steps of fine-tuning",
            fix="--rounds, --phase-epochs and --update-steps must be positive, --finetune-epochs zero or more",
        )
    if not 0 <= budget.exchange < 1:
        raise UserError(
            f"an exchange of {budget.exchange} of the live weights", fix="give --exchange of 0 or more, below 1"
        )
    schedule = maker(dataclasses.replace(budget, sparsity=plan.sparsity), len(plan.groups))
    return dataclasses.replace(plan, method=method, phases=schedule.phases, start_masks=schedule.start_masks)


def phase_at(plan: Plan, step: int) -> int:
    """Index of the phase that trains `step`. Raises IndexError past the last one."""
    for index, phase in enumerate(plan.phases):
        if phase.start <= step < phase.stop:
            return index
    raise IndexError(f"step {step} is in no phase of [0, {plan.num_steps})")
