"""Schedules that grow: groups become dense in turn, train, and are pruned back (GaP)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from gapfx.budget import CONTINUED, SCHEDULES, Budget, Schedule, Turnover, reads
from gapfx.errors import UserError
from gapfx.plan import Phase
from gapfx.schedules.exchange import exchanged


@SCHEDULES.register("gap")
@reads("state", "phase_lr", "growth", "landing", "exchange", "regrow_warmup")
def gap(budget: Budget, num_groups: int) -> Schedule:
    """Cyclic GaP (Ma et al., ICLR 2022): each group in turn grown to dense, trained, pruned; then a full fine-tune.

    One learning rate and one optimizer state for the whole run, which is better than the paper's restarts at each phase
    (RESULTS.md); those are `state="reset", lr="restart"`.
    """
    return _one_by_one(budget, [list(range(num_groups))] * budget.rounds)


@SCHEDULES.register("rgap")
@reads("state", "phase_lr", "growth", "landing", "exchange", "regrow_warmup")
def rgap(budget: Budget, num_groups: int) -> Schedule:
    """GaP with the groups of each round in random order, none twice in a row: the control for the cyclic order."""
    draw, orders = random.Random(budget.seed), list[list[int]]()
    for _ in range(budget.rounds):
        order = draw.sample(range(num_groups), num_groups)
        if orders and num_groups > 1 and order[0] == orders[-1][-1]:
            order.append(order.pop(0))
        orders.append(order)
    return _one_by_one(budget, orders)


def _one_by_one(budget: Budget, orders: Sequence[Sequence[int]]) -> Schedule:
    """Each group grown alone, in the order given for each round; then a full fine-tune."""
    turnover = budget.turnover(CONTINUED)
    for name, flag, is_on in (
        ("a landing in several prunes", "--landing 1", budget.landing > 1),
        ("an exchange", "--exchange 0", budget.exchange > 0),
    ):
        if is_on and turnover != CONTINUED:
            raise UserError(
                f"{name} needs one learning rate and one optimizer state",
                fix=f"leave out --phase-lr restart and --state reset, or give {flag}",
            )
    turns = [(turn, group) for turn, order in enumerate(orders) for group in order]
    phases = [part for index, turn in enumerate(turns) for part in _turn(budget, turnover, index, *turn)]
    phases += budget.finetune(len(turns) * budget.phase_steps, turnover)
    return Schedule(exchanged(budget, phases) if budget.exchange else tuple(phases))


def _turn(budget: Budget, turnover: Turnover, index: int, turn: int, group: int) -> Iterator[Phase]:
    """One group from its growth to its prune, which may take several, further and further as in `gmp`."""
    first, num_parts = index * budget.phase_steps, min(budget.landing, budget.phase_steps)
    bounds = [first + budget.phase_steps * part // num_parts for part in range(num_parts + 1)]
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield Phase(
            f"round {turn + 1} group {group + 1}" + (f", pruned {part} of {num_parts} times" if part else ""),
            start=start,
            stop=stop,
            grow=() if part else (group,),
            prune=(group,),
            round=turn,
            state=turnover.state,
            lr=turnover.lr,
            growth="zero" if part else budget.growth,
            depth=1 - (1 - (part + 1) / num_parts) ** 3,
        )


@SCHEDULES.register("pgap")
@reads("state", "phase_lr", "growth", "replicas", "regrow_warmup")
def pgap(budget: Budget, num_groups: int) -> Schedule:
    """Parallel GaP (same paper): replicas of one sparse model each grow another group, and are merged; then as `gap`.

    All groups start sparse. A round visits every group in as many phases as the replicas need turns.
    """
    replicas, turnover = budget.replicas or num_groups, budget.turnover(CONTINUED)
    if budget.exchange:
        raise UserError("pgap has no exchange", fix="give --exchange 0, or take --method gap")
    if budget.growth != "zero" and replicas > 1:
        raise UserError("weights of pgap grow from zero", fix="take out --growth saved, or take --method gap")
    if not 1 <= replicas <= num_groups:
        raise UserError(
            f"{replicas} replicas are more than the {num_groups} groups",
            fix=f"give --replicas of at most {num_groups}, or more --groups",
        )
    shares = [tuple(range(first, min(first + replicas, num_groups))) for first in range(0, num_groups, replicas)]
    turns = [(turn, share) for turn in range(budget.rounds) for share in shares]
    phases = [
        Phase(
            f"round {turn + 1} groups {share[0] + 1} to {share[-1] + 1}",
            start=index * budget.phase_steps,
            stop=(index + 1) * budget.phase_steps,
            grow=share,
            prune=share,
            round=turn,
            state=turnover.state,
            lr=turnover.lr,
            growth=budget.growth if len(share) == 1 else "zero",
            replicas=len(share),
        )
        for index, (turn, share) in enumerate(turns)
    ]
    return Schedule((*phases, *budget.finetune(len(turns) * budget.phase_steps, turnover)))
