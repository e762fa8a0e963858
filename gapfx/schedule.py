"""Schedules: tables of phases that tile the steps of a run.

A schedule is a function `(Budget, num_groups) -> Phases`; with the same budget every schedule but `pgap`, whose phases
train several models side by side, has the same number of steps, so that methods can be compared at equal epochs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

from gapfx.budget import CONTINUED, RESTARTED, Turnover
from gapfx.budget import Budget as Budget
from gapfx.budget import Schedule as Schedule
from gapfx.errors import UserError
from gapfx.plan import Phase, Plan, RegrowRule
from gapfx.registry import Registry

ScheduleMaker = Callable[[Budget, int], Schedule]
# Of the live weights, at the first update; and the share of the run after which masks stay (Evci et al., 2020).
DROP, UPDATES_UNTIL = 0.3, 0.75
SCHEDULES: Registry[ScheduleMaker] = Registry("method")


@SCHEDULES.register("gap")
def gap(budget: Budget, num_groups: int) -> Schedule:
    """Cyclic GaP (Ma et al., ICLR 2022): each group in turn grown to dense, trained, pruned; then a full fine-tune.

    One learning rate and one optimizer state for the whole run, which is better than the paper's restarts at each phase
    (RESULTS.md); those are `state="reset", lr="restart"`.
    """
    return _one_by_one(budget, [list(range(num_groups))] * budget.rounds)


@SCHEDULES.register("rgap")
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
    if budget.landing > 1 and turnover != CONTINUED:
        raise UserError(
            "a landing in several prunes needs one learning rate and one optimizer state",
            fix="leave out --phase-lr restart and --state reset, or give --landing 1",
        )
    turns = [(turn, group) for turn, order in enumerate(orders) for group in order]
    phases = [part for index, turn in enumerate(turns) for part in _turn(budget, turnover, index, *turn)]
    return Schedule((*phases, *_finetune(budget, len(turns) * budget.phase_steps, turnover)))


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
def pgap(budget: Budget, num_groups: int) -> Schedule:
    """Parallel GaP (same paper): replicas of one sparse model each grow another group, and are merged; then as `gap`.

    All groups start sparse. A round visits every group in as many phases as the replicas need turns.
    """
    replicas, turnover = budget.replicas or num_groups, budget.turnover(CONTINUED)
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
    return Schedule((*phases, *_finetune(budget, len(turns) * budget.phase_steps, turnover)))


@SCHEDULES.register("dense")
def dense(budget: Budget, num_groups: int) -> Schedule:
    """Every group dense from the first step to the last: the control that all sparse results are held against."""
    phase = Phase("dense", 0, _total_steps(budget, num_groups), grow=tuple(range(num_groups)))
    return Schedule((phase,))


@SCHEDULES.register("static")
def static(budget: Budget, num_groups: int) -> Schedule:
    """Random masks, never changed."""
    return Schedule((Phase("static", 0, _total_steps(budget, num_groups)),))


@SCHEDULES.register("oneshot")
def oneshot(budget: Budget, num_groups: int) -> Schedule:
    """Train dense, prune everything once, fine-tune with fixed masks; weights that are trained are pruned at once."""
    everything, stop = tuple(range(num_groups)), _growing_steps(budget, num_groups)
    if budget.is_trained:
        return Schedule((Phase("fine-tune", 0, _total_steps(budget, num_groups)),))
    if not budget.finetune_steps:
        raise UserError("oneshot needs a fine-tune after its prune", fix="give --finetune-epochs above 0")
    finetune = _finetune(budget, stop, budget.turnover(RESTARTED))
    return Schedule((Phase("dense", 0, stop, everything, everything), *finetune))


@SCHEDULES.register("acdc")
def acdc(budget: Budget, num_groups: int) -> Schedule:
    """AC/DC (Peste et al., NeurIPS 2021, algorithm 1): all groups dense and all sparse in turn, and sparse at the end.

    One learning rate for the whole run. Where weights grow again the optimizer state does what the budget says (the
    paper resets momentum there); a sparse phase carries on with that of the dense one before it.
    """
    everything, count = tuple(range(num_groups)), budget.rounds * num_groups
    if count % 2 and not budget.finetune_steps:
        raise UserError("acdc would end with a dense phase", fix="give --finetune-epochs above 0, or an even --rounds")
    phases = [
        Phase(
            f"{'sparse' if index % 2 else 'dense'} {index // 2 + 1}",
            start=index * budget.phase_steps,
            stop=(index + 1) * budget.phase_steps,
            grow=() if index % 2 else everything,
            prune=() if index % 2 else everything,
            round=index // 2,
            state="carry" if index % 2 else budget.turnover(RESTARTED).state,
            lr="continue",
            growth=budget.growth,
        )
        for index in range(count)
    ]
    return Schedule((*phases, *_finetune(budget, count * budget.phase_steps, CONTINUED)))


@SCHEDULES.register("gmp")
def gmp(budget: Budget, num_groups: int) -> Schedule:
    """Gradual magnitude pruning (Zhu and Gupta, 2017, equation 1): dense at first, pruned further phase by phase.

    After k of n phases the sparsity is 1 - (1 - k/n)^3 of the target. What is pruned does not come back. One learning
    rate and one optimizer state for the whole run; masks stay in the fine-tune at the end.
    """
    everything, count = tuple(range(num_groups)), budget.rounds * num_groups
    if not budget.finetune_steps:
        raise UserError("gmp needs a fine-tune after its last prune", fix="give --finetune-epochs above 0")
    phases = [
        Phase(
            "dense" if index == 0 else f"pruned {index} times" if index > 1 else "pruned once",
            start=index * budget.phase_steps,
            stop=(index + 1) * budget.phase_steps,
            grow=() if index else everything,
            prune=everything,
            state="carry",
            lr="continue",
            depth=1 - (1 - (index + 1) / count) ** 3,
        )
        for index in range(count)
    ]
    return Schedule((*phases, *_finetune(budget, count * budget.phase_steps, CONTINUED)))


@SCHEDULES.register("imp")
def imp(budget: Budget, num_groups: int) -> Schedule:
    """Iterative magnitude pruning with late rewinding (Frankle et al., ICML 2020): the search for lottery tickets.

    After a tenth of the first training all weights are kept. Each training ends with a prune of the same share of what
    is live, all weights go back to those kept, and what was not pruned is trained again, with its own learning rate.
    """
    everything, count, length = tuple(range(num_groups)), budget.rounds * num_groups, budget.phase_steps
    if not budget.finetune_steps:
        raise UserError("imp needs a training after its last prune", fix="give --finetune-epochs above 0")
    early = max(1, length // 10)
    phases = [
        Phase(
            f"training {index + 1}",
            start=index * length if index else early,
            stop=(index + 1) * length,
            grow=() if index else everything,
            prune=everything,
            round=index,
            rewind=index > 0,
            state="reset" if index else "carry",
            depth=_imp_depth(budget.sparsity, (index + 1) / count),
        )
        for index in range(count)
    ]
    first = Phase("early weights", 0, early, everything, keep=True)
    if early == length:
        first, phases = dataclasses.replace(phases[0], start=0, keep=True, state="reset"), phases[1:]
    last = Phase("last training", count * length, count * length + budget.finetune_steps, round=count, rewind=True)
    return Schedule((first, *phases, last))


def _imp_depth(sparsity: float, share: float) -> float:
    """Depth at which a share of all prunes is done, of which each takes the same share of what is live."""
    return (1 - (1 - sparsity) ** share) / sparsity if sparsity and share < 1 else 1.0


@SCHEDULES.register("st3")
def st3(budget: Budget, num_groups: int) -> Schedule:
    """ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023): soft thresholds, straight through to the gradients.

    Weights are dense all the time, and what forwards see of them ever sparser, along the same cubic as in `gmp`; then
    at the target, until the end, where they are what was seen. One learning rate and one optimizer state for all of it.
    """
    everything, stop = tuple(range(num_groups)), _growing_steps(budget, num_groups)
    ramp = Phase("softened further and further", 0, stop, everything, state="carry", lr="continue", soften="ramp")
    if not budget.finetune_steps:
        return Schedule((dataclasses.replace(ramp, prune=everything),))
    hold = dataclasses.replace(ramp, name="softened", start=stop, stop=stop + budget.finetune_steps, soften="hold")
    return Schedule((ramp, dataclasses.replace(hold, prune=everything)))


@SCHEDULES.register("snip")
def snip(budget: Budget, num_groups: int) -> Schedule:
    """SNIP (Lee et al., ICLR 2019): the weights that matter most to the loss of the first batch, and no others.

    The paper's one threshold over all layers is `--groups 1 --allocation global`.
    """
    return dataclasses.replace(static(budget, num_groups), start_masks="snip")


@SCHEDULES.register("set")
def set_(budget: Budget, num_groups: int) -> Schedule:
    """SET (Mocanu et al., 2018): every `update_steps` 30 % of the live weights are dropped, others regrown at random.

    Regrown weights start at 0, where the paper draws them anew.
    """
    return _rewired(budget, num_groups, "random", lambda step: DROP)


@SCHEDULES.register("rigl")
def rigl(budget: Budget, num_groups: int) -> Schedule:
    """RigL (Evci et al., ICML 2020): as `set`, but those with the largest gradient of the dense weight are regrown.

    The share falls along a cosine, 0.15 (1 + cos(pi t / T)), until T, three quarters of the run; masks stay then.
    Weights that keep theirs keep their optimizer state; that of regrown ones is 0.
    """
    until = UPDATES_UNTIL * _total_steps(budget, num_groups)
    return _rewired(
        budget, num_groups, "gradient", lambda step: DROP / 2 * (1 + math.cos(math.pi * step / until)) * (step < until)
    )


def _rewired(budget: Budget, num_groups: int, regrow: RegrowRule, drop: Callable[[int], float]) -> Schedule:
    """Random masks; `drop(step)` of the live weights are exchanged every `update_steps`, while it is not 0."""
    total = _total_steps(budget, num_groups)
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
    schedule = maker(dataclasses.replace(budget, sparsity=plan.sparsity), len(plan.groups))
    return dataclasses.replace(plan, method=method, phases=schedule.phases, start_masks=schedule.start_masks)


def phase_at(plan: Plan, step: int) -> int:
    """Index of the phase that trains `step`. Raises IndexError past the last one."""
    for index, phase in enumerate(plan.phases):
        if phase.start <= step < phase.stop:
            return index
    raise IndexError(f"step {step} is in no phase of [0, {plan.num_steps})")


def _growing_steps(budget: Budget, num_groups: int) -> int:
    return budget.rounds * num_groups * budget.phase_steps


def _total_steps(budget: Budget, num_groups: int) -> int:
    return _growing_steps(budget, num_groups) + budget.finetune_steps


def _finetune(budget: Budget, start: int, turnover: Turnover) -> tuple[Phase, ...]:
    if not budget.finetune_steps:
        return ()
    stop = start + budget.finetune_steps
    return (Phase("fine-tune", start, stop, round=budget.rounds, state=turnover.state, lr=turnover.lr),)
