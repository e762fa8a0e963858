"""Schedules that prune what was dense, all groups alike, and the controls that never change a mask."""

from __future__ import annotations

import dataclasses

from gapfx.budget import CONTINUED, RESTARTED, SCHEDULES, Budget, Schedule, reads
from gapfx.errors import UserError
from gapfx.plan import Phase


@SCHEDULES.register("dense")
@reads()
def dense(budget: Budget, num_groups: int) -> Schedule:
    """Every group dense from the first step to the last: the control that all sparse results are held against."""
    phase = Phase("dense", 0, budget.total_steps(num_groups), grow=tuple(range(num_groups)))
    return Schedule((phase,))


@SCHEDULES.register("static")
@reads()
def static(budget: Budget, num_groups: int) -> Schedule:
    """Random masks, never changed."""
    return Schedule((Phase("static", 0, budget.total_steps(num_groups)),))


@SCHEDULES.register("oneshot")
@reads("state", "phase_lr")
def oneshot(budget: Budget, num_groups: int) -> Schedule:
    """Train dense, prune everything once, fine-tune with fixed masks; weights that are trained are pruned at once."""
    everything, stop = tuple(range(num_groups)), budget.growing_steps(num_groups)
    if budget.is_trained:
        return Schedule((Phase("fine-tune", 0, budget.total_steps(num_groups)),))
    if not budget.finetune_steps:
        raise UserError("oneshot needs a fine-tune after its prune", fix="give --finetune-epochs above 0")
    last = budget.finetune(stop, budget.turnover(RESTARTED))
    return Schedule((Phase("dense", 0, stop, everything, everything), *last))


@SCHEDULES.register("acdc")
@reads("state", "growth", "regrow_warmup")
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
    return Schedule((*phases, *budget.finetune(count * budget.phase_steps, CONTINUED)))


@SCHEDULES.register("gmp")
@reads()
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
    return Schedule((*phases, *budget.finetune(count * budget.phase_steps, CONTINUED)))


@SCHEDULES.register("imp")
@reads()
def imp(budget: Budget, num_groups: int) -> Schedule:
    """Iterative magnitude pruning with late rewinding (Frankle et al., ICML 2020): the search for lottery tickets.

    All weights are kept as they are a tenth into the first training. Each training ends with a prune of the same share
    of what is live; then all weights go back to those kept, the learning rate to what it was there, and what was not
    pruned is trained again.
    """
    everything, count, length = tuple(range(num_groups)), budget.rounds * num_groups, budget.phase_steps
    if not budget.finetune_steps:
        raise UserError("imp needs a training after its last prune", fix="give --finetune-epochs above 0")
    early = max(1, length // 10)
    phases = [
        _from_step(
            early,
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
            ),
        )
        for index in range(0 if early < length else 1, count)
    ]
    first = Phase("early weights", 0, early, everything, keep=True, lr_steps=length)
    if early == length:
        first = dataclasses.replace(
            first, name="training 1", prune=everything, depth=_imp_depth(budget.sparsity, 1 / count)
        )
    stop = count * length + budget.finetune_steps
    last = _from_step(early, Phase("last training", count * length, stop, round=count, rewind=True))
    return Schedule((first, *phases, last))


def _from_step(step: int, phase: Phase) -> Phase:
    """The phase with a learning rate that goes on from this step of a schedule."""
    return dataclasses.replace(phase, lr_skip=step, lr_steps=step + phase.num_steps)


def _imp_depth(sparsity: float, share: float) -> float:
    """Depth at which a share of all prunes is done, of which each takes the same share of what is live."""
    return (1 - (1 - sparsity) ** share) / sparsity if sparsity and share < 1 else 1.0


@SCHEDULES.register("st3")
@reads()
def st3(budget: Budget, num_groups: int) -> Schedule:
    """ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023): soft thresholds, straight through to the gradients.

    Weights are dense all the time, and what forwards see of them ever sparser, along the same cubic as in `gmp`; then
    at the target, until the end, where they are what was seen. One learning rate and one optimizer state for all of it.
    """
    everything, stop = tuple(range(num_groups)), budget.growing_steps(num_groups)
    ramp = Phase("softened further and further", 0, stop, everything, state="carry", lr="continue", soften="ramp")
    if not budget.finetune_steps:
        return Schedule((dataclasses.replace(ramp, prune=everything),))
    hold = dataclasses.replace(ramp, name="softened", start=stop, stop=stop + budget.finetune_steps, soften="hold")
    return Schedule((ramp, dataclasses.replace(hold, prune=everything)))


@SCHEDULES.register("snip")
@reads()
def snip(budget: Budget, num_groups: int) -> Schedule:
    """SNIP (Lee et al., ICLR 2019): the weights that matter most to the loss of the first batch, and no others.

    The paper's one threshold over all layers is `--groups 1 --allocation global`.
    """
    return dataclasses.replace(static(budget, num_groups), start_masks="snip")
