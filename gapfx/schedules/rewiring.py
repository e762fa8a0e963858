"""Schedules that exchange: random masks, of which a share is dropped and regrown again and again (SET, RigL)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from gapfx.budget import SCHEDULES, Budget, Schedule, reads
from gapfx.plan import Phase, RegrowRule
from gapfx.schedules.exchange import falling

# Of the live weights, at the first update (Evci et al., 2020).
DROP = 0.3


@SCHEDULES.register("set")
@reads("update_steps")
def set_(budget: Budget, num_groups: int) -> Schedule:
    """SET (Mocanu et al., 2018): every `update_steps` 30 % of the live weights are dropped, others regrown at random.

    Regrown weights start at 0, where the paper draws them anew.
    """
    return _rewired(budget, num_groups, "random", lambda step: DROP)


@SCHEDULES.register("rigl")
@reads("update_steps")
def rigl(budget: Budget, num_groups: int) -> Schedule:
    """RigL (Evci et al., ICML 2020): as `set`, but those with the largest gradient of the dense weight are regrown.

    The share falls along a cosine, 0.15 (1 + cos(pi t / T)), until T, three quarters of the run; masks stay then.
    Weights that keep theirs keep their optimizer state; that of regrown ones is 0.
    """
    total = budget.total_steps(num_groups)
    return _rewired(budget, num_groups, "gradient", lambda step: falling(DROP, step, total))


def _rewired(budget: Budget, num_groups: int, regrow: RegrowRule, drop: Callable[[int], float]) -> Schedule:
    """Random masks; `drop(step)` of the live weights are exchanged every `update_steps`, while it is not 0."""
    total = budget.total_steps(num_groups)
    starts = [0, *(step for step in range(budget.update_steps, total, budget.update_steps) if drop(step))]
    phases = [
        Phase(
            f"update {index}" if index else "random masks",
            start,
            stop,
            state="carry",
            lr="continue",
            drop=drop(start) if index else 0.0,
            regrow=regrow,
        )
        for index, (start, stop) in enumerate(itertools.pairwise([*starts, total]))
    ]
    return Schedule(tuple(phases))
