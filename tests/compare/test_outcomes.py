"""Which runs count for what: learning rates that are chosen, duels, and rows, from made-up values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from gapfx.compare.outcomes import Outcome, best_lr_scales, duels_of, outcome_of, rows_of
from gapfx.compare.records import Record
from gapfx.compare.study import Budget, Contender, Study, Trial, Tuning
from gapfx.compare.table import Tables
from gapfx.errors import UserError

DENSE, GAP, SET = (Contender(name, name) for name in ("dense", "gap", "set"))
STUDY = Study(
    "task.py",
    "accuracy",
    (DENSE, GAP, SET),
    (0.8, 0.9),
    (0, 1),
    ("epochs",),
    subject="gap",
    tune=Tuning((0.5, 1.0, 2.0), 0.9, 100),
)


def outcome(trial: Trial, value: float) -> Outcome:
    return Outcome(trial, value, flops=1e9, live_bytes=1e3, seconds=1, epochs=2)


def trained(value: Callable[[Trial], float], study: Study = STUDY) -> list[Outcome]:
    return [outcome(trial, value(trial)) for trial in (*study.tuning_trials(), *study.trials())]


def test_the_best_learning_rate_is_that_of_the_best_metric_and_near_1_among_equals() -> None:
    values = {"dense": {0.5: 0.7, 1.0: 0.8, 2.0: 0.9}, "gap": {0.5: 0.9, 1.0: 0.9, 2.0: 0.8}}
    values["set"] = {0.5: 0.9, 1.0: 0.1, 2.0: 0.9}
    outcomes = [outcome(t, values[t.contender.name][t.candidate or 0]) for t in STUDY.tuning_trials()]
    chosen = best_lr_scales(STUDY, outcomes)
    assert (chosen["dense"], chosen["gap"]) == (2.0, 1.0)
    assert chosen["set"] in (0.5, 2.0)
    falling = dataclasses.replace(STUDY, metric="ppl", is_lower_better=True)
    assert best_lr_scales(falling, outcomes) == {"dense": 0.5, "gap": 2.0, "set": 1.0}


def test_tuning_runs_count_for_nothing_else() -> None:
    rows = rows_of(STUDY, trained(lambda trial: 100 if trial.candidate else 0.5))
    assert {row.value.values for row in rows} == {(0.5, 0.5)}


def test_a_duel_pairs_the_subject_with_each_other_method_over_sparsities_and_seeds() -> None:
    (duel,) = duels_of(STUDY, trained(lambda t: 0.5 + (t.contender.name == "gap") * (0.1 if t.seed else -0.02)))
    assert (duel.name, duel.num_won, duel.difference.num_pairs) == ("set", 2, 4)
    assert duel.difference.mean == pytest.approx(0.04)


def test_less_of_a_loss_wins_a_duel() -> None:
    study = dataclasses.replace(STUDY, metric="loss", is_lower_better=True)
    (duel,) = duels_of(study, trained(lambda t: 0.5 - 0.1 * (t.contender.name == "gap"), study))
    assert duel.num_won == 4


def test_without_a_subject_there_are_no_duels() -> None:
    study = dataclasses.replace(STUDY, subject="")
    assert duels_of(study, trained(lambda t: 0.5, study)) == []


def test_with_operations_of_its_own_each_budget_has_its_own_control() -> None:
    budgets: tuple[Budget, ...] = ("epochs", "flops")
    study = dataclasses.replace(STUDY, budgets=budgets, flops=0.5)
    outcomes = trained(lambda t: {"epochs": 0.9, "flops": 0.8}[t.budget] - 0.1 * (t.contender.name != "dense"), study)
    for row in rows_of(study, outcomes):
        assert row.against is None or row.against.mean == pytest.approx(-0.1)
        assert row.name != "dense" or row.value.mean == {"epochs": 0.9, "flops": 0.8}[row.budget]


def test_a_study_with_a_test_is_judged_on_it_and_tunes_on_the_validation_data() -> None:
    study = dataclasses.replace(STUDY, test=True)
    record = Record("r", {}, {"accuracy": 0.7}, {"accuracy": 0.6}, 1, 1, 1, 1, 0.8, {})
    (tuning, *_), (final, *_) = study.tuning_trials(), study.trials()
    assert outcome_of(study, tuning, record).value == 0.7
    assert outcome_of(study, final, record).value == 0.6
    with pytest.raises(UserError, match="the task gives no metric 'accuracy'"):
        outcome_of(study, final, dataclasses.replace(record, test={}))


def test_other_metrics_stand_beside_the_one_that_judges() -> None:
    study = dataclasses.replace(STUDY, also=("loss",))
    record = Record("r", {}, {"accuracy": 0.7, "loss": 2.5}, {}, 1, 1, 1, 1, 0.8, {})
    outcomes = [
        outcome_of(study, t, dataclasses.replace(record, metrics={"accuracy": 0.7, "loss": 2.0 + t.seed}))
        for t in study.trials()
    ]
    tables = Tables.of(study, outcomes)
    assert tables.columns()[-1] == "loss, mean"
    assert all(line.endswith("| 2.5000 |") for line in tables.markdown().splitlines() if line.startswith("| gap"))
    with pytest.raises(UserError, match="the task gives no metric 'loss'"):
        outcome_of(study, next(study.trials()), dataclasses.replace(record, metrics={"accuracy": 0.7}))


def test_tables_hold_the_duels_below_the_rows() -> None:
    tables = Tables.of(STUDY, trained(lambda t: 0.5 + 0.1 * (t.contender.name == "gap")))
    assert "| set | 4 | +0.1000 | 4 of 4 | 0.125 |" in tables.markdown()
    assert "gap less each other method, over all sparsities and seeds that both have:" in tables.text()
