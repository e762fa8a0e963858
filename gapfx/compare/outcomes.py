"""What finished runs of a study came to, as plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mean

from gapfx.compare.records import Record, Records
from gapfx.compare.statistics import Difference, Spread, paired
from gapfx.compare.study import CONTROL, Budget, Study, Trial
from gapfx.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """One finished run: its metric, operations of its training, bytes of its live weights (see gapfx.compare.records).

    The metric is that of the test data where the study has some, of the validation data in tuning runs and elsewhere;
    `also` are other metrics of the same data.
    """

    trial: Trial
    value: float
    flops: float
    live_bytes: float
    seconds: float
    epochs: float
    also: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Row:
    """A contender at a sparsity over all seeds; `against` is the control at the seeds that both have, None without one.

    `also` are means of other metrics.
    """

    name: str
    sparsity: float
    budget: Budget
    value: Spread
    flops: float
    live_bytes: float
    seconds: float
    epochs: float
    against: Difference | None
    also: Mapping[str, float] = field(default_factory=dict[str, float])


def outcome_of(study: Study, trial: Trial, record: Record) -> Outcome:
    """The outcome of a finished run. Raises UserError for a metric that the task does not give."""
    metrics = record.test if study.test and trial.candidate is None else record.metrics
    for name in (study.metric, *study.also):
        if name not in metrics:
            told = ", ".join(metrics) or "none"
            raise UserError(f"the task gives no metric {name!r}", where=record.name, fix=f"one of {told}")
    also = {name: metrics[name] for name in study.also}
    costs = record.flops, record.live_bytes, record.seconds, record.epochs
    return Outcome(trial, metrics[study.metric], *costs, also)


def recorded(study: Study, trials: Iterable[Trial], records: Records) -> Iterator[Outcome]:
    """Outcomes of the trials that there is a record of."""
    for trial in trials:
        if (record := records.found.get(trial.name)) is not None:
            yield outcome_of(study, trial, record)


def best_lr_scales(study: Study, outcomes: Iterable[Outcome]) -> dict[str, float]:
    """The factor of the learning rate with the best metric for each contender; of equal ones, that nearest to 1."""
    sign = -1 if study.is_lower_better else 1
    found: dict[str, list[tuple[float, float, float]]] = {}
    for outcome in outcomes:
        scale = outcome.trial.candidate or 1.0
        ranked = (sign * outcome.value, -abs(math.log(scale)), scale)
        found.setdefault(outcome.trial.contender.name, []).append(ranked)
    return {name: max(each)[2] for name, each in found.items()}


@dataclass(frozen=True)
class Duel:
    """The study's subject less another contender, over all sparsities and seeds that both have."""

    name: str
    budget: Budget
    difference: Difference
    num_won: int


def duels_of(study: Study, outcomes: Iterable[Outcome]) -> list[Duel]:
    """A duel with each contender but the control, budget by budget; none without a subject."""
    found = [outcome for outcome in outcomes if outcome.trial.candidate is None]
    rivals = [c.name for c in study.contenders if c.method != CONTROL and c.name != study.subject]
    sides = itertools.product(study.budgets, rivals if study.subject else ())
    return [duel for budget, rival in sides if (duel := _duel(study, found, rival, budget)) is not None]


def _duel(study: Study, found: list[Outcome], rival: str, budget: Budget) -> Duel | None:
    ours, theirs = ({_pair(o): o.value for o in found if _is_of(o, name, budget)} for name in (study.subject, rival))
    pairs = [(ours[pair], theirs[pair]) for pair in ours if pair in theirs]
    if not pairs:
        return None
    sign = -1 if study.is_lower_better else 1
    num_won = sum(sign * (a - b) > 0 for a, b in pairs)
    return Duel(rival, budget, paired([a for a, _ in pairs], [b for _, b in pairs]), num_won)


def _is_of(outcome: Outcome, name: str, budget: Budget) -> bool:
    return outcome.trial.contender.name == name and outcome.trial.budget == budget


def _pair(outcome: Outcome) -> tuple[float, int]:
    return outcome.trial.sparsity, outcome.trial.seed


def rows_of(study: Study, outcomes: Iterable[Outcome]) -> list[Row]:
    """Rows in the order of the study, over the seeds that each has; the control stands in each comparison."""
    found = list(outcomes)
    return [
        row
        for budget in study.budgets
        for contender in study.contenders
        for sparsity in ((0.0,) if contender.method == CONTROL else study.sparsities)
        if (row := _row(study, found, contender.name, sparsity, budget)) is not None
    ]


def _row(study: Study, found: list[Outcome], name: str, sparsity: float, budget: Budget) -> Row | None:
    own = _by_seed(study, found, name, sparsity, budget)
    if not own:
        return None
    control = next((c.name for c in study.contenders if c.method == CONTROL), "")
    theirs = _by_seed(study, found, control, 0.0, budget)
    both = [seed for seed in own if seed in theirs]
    is_other = name != control and both
    against = paired([own[s].value for s in both], [theirs[s].value for s in both]) if is_other else None
    return Row(
        name,
        sparsity,
        budget,
        Spread(tuple(run.value for run in own.values())),
        flops=mean(run.flops for run in own.values()),
        live_bytes=mean(run.live_bytes for run in own.values()),
        seconds=mean(run.seconds for run in own.values()),
        epochs=mean(run.epochs for run in own.values()),
        against=against,
        also={metric: mean(run.also[metric] for run in own.values()) for metric in study.also},
    )


def _by_seed(study: Study, found: list[Outcome], name: str, sparsity: float, budget: Budget) -> dict[int, Outcome]:
    return {
        outcome.trial.seed: outcome
        for outcome in found
        if outcome.trial.candidate is None
        and outcome.trial.contender.name == name
        and outcome.trial.sparsity == sparsity
        and outcome.trial.budget == (study.control_budget(budget) if _is_control(outcome) else budget)
    }


def _is_control(outcome: Outcome) -> bool:
    return outcome.trial.contender.method == CONTROL
