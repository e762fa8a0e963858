"""A method of your own in one file: which groups grow and are pruned when is a table of phases.

    gapfx sparsify examples/custom_method.py --out runs/widening

The task is that of fashion.py. `widening` grows ever more groups at a time, so that the model is sparse for most of the
run and dense for its last turn: one group, then two, and so on, each time pruned back. A package makes methods known
everywhere by an entry point, as tests/plugin does.
"""

from __future__ import annotations

import fashion
from fashion import data, evaluate, loss, model, optimizer

from gapfx.budget import CONTINUED
from gapfx.plan import Phase
from gapfx.schedule import SCHEDULES, Budget, Schedule

__all__ = ["data", "evaluate", "loss", "model", "optimizer"]
defaults = {**fashion.defaults, "method": "widening"}


@SCHEDULES.register("widening")
def widening(budget: Budget, num_groups: int) -> Schedule:
    """Turn k of a round grows the first k groups; all masks are fixed in the fine-tune at the end."""
    turnover = budget.turnover(CONTINUED)
    turns = [(turn, width) for turn in range(budget.rounds) for width in range(1, num_groups + 1)]
    phases = [
        Phase(
            f"round {turn + 1}, {width} groups" if width > 1 else f"round {turn + 1}, 1 group",
            start=index * budget.phase_steps,
            stop=(index + 1) * budget.phase_steps,
            grow=tuple(range(width)),
            prune=tuple(range(width)),
            round=turn,
            state=turnover.state,
            lr=turnover.lr,
        )
        for index, (turn, width) in enumerate(turns)
    ]
    stop = len(turns) * budget.phase_steps
    end = stop + budget.finetune_steps
    finetune = Phase("fine-tune", stop, end, round=budget.rounds, state=turnover.state, lr=turnover.lr)
    return Schedule((*phases, finetune) if budget.finetune_steps else tuple(phases))
