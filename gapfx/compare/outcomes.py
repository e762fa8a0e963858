"""What finished runs of a study came to, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gapfx.compare.statistics import Difference, Spread, paired
from gapfx.compare.study import CONTROL, Budget, Study, Trial
from gapfx.errors import UserError
from gapfx.results import LOWER_IS_BETTER

FACTS = "comparison.json"


@dataclass(frozen=True)
class Outcome:
    """One finished run: its metric on the validation data, operations of its training, bytes of its live weights.

    Bytes are those of fp32 values with a bit a planned weight for the masks, and of all that is dense.
    """

    trial: Trial
    value: float
    flops: float
    live_bytes: float
    seconds: float
    epochs: float


@dataclass(frozen=True)
class Row:
    """A contender at a sparsity over all seeds; `against` is the control at the same seeds, None without one."""

    name: str
    sparsity: float
    budget: Budget
    value: Spread
    flops: float
    live_bytes: float
    seconds: float
    epochs: float
    against: Difference | None


def read_outcome(trial: Trial, folder: Path, metric: str) -> Outcome | None:
    """The outcome of a run that is finished, else None. Raises UserError for a metric that it has not."""
    summary, facts = folder / "summary.json", folder / FACTS
    if not summary.is_file() or not facts.is_file():
        return None
    told: dict[str, Any] = json.loads(summary.read_text())
    planned: dict[str, Any] = json.loads(facts.read_text())
    metrics = told["metrics"]["final"]
    if metric not in metrics:
        raise UserError(f"the task gives no metric {metric!r}", where=str(folder), fix=f"one of {', '.join(metrics)}")
    return Outcome(trial, metrics[metric], planned["flops"], _live_bytes(told), told["seconds"], planned["epochs"])


def _live_bytes(summary: dict[str, Any]) -> float:
    weights = summary["per_weight"].values()
    numel = sum(weight["numel"] for weight in weights)
    zeros = numel - sum(weight["kept"] for weight in weights)
    if not zeros:
        return 4.0 * summary["num_parameters"]
    return 4.0 * (summary["num_parameters"] - zeros) + numel / 8


def rows_of(study: Study, outcomes: Iterable[Outcome]) -> list[Row]:
    """Rows in the order of the study; the control stands in each comparison, and only seeds that all have count."""
    found = list(outcomes)
    return [
        row
        for budget in study.budgets
        for contender in study.contenders
        for sparsity in ((0.0,) if contender.method == CONTROL else study.sparsities)
        if (row := _row(study, found, contender.name, sparsity, budget)) is not None
    ]


def is_lower_better(metric: str) -> bool:
    """Whether less of the metric is more, going by its name."""
    return any(word in metric.lower() for word in LOWER_IS_BETTER)


def _row(study: Study, found: list[Outcome], name: str, sparsity: float, budget: Budget) -> Row | None:
    own = _by_seed(found, name, sparsity, budget)
    if not own:
        return None
    control = next((c.name for c in study.contenders if c.method == CONTROL), "")
    theirs = _by_seed(found, control, 0.0, budget)
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
    )


def _by_seed(found: list[Outcome], name: str, sparsity: float, budget: Budget) -> dict[int, Outcome]:
    """The control is trained once, whatever the budget."""
    return {
        outcome.trial.seed: outcome
        for outcome in found
        if outcome.trial.contender.name == name
        and outcome.trial.sparsity == sparsity
        and (outcome.trial.budget == budget or outcome.trial.contender.method == CONTROL)
    }
