"""What a page says of how a study was made."""

from __future__ import annotations

from gapfx.compare.outcomes import Outcome
from gapfx.compare.story import story
from gapfx.compare.study import Contender, Study, Trial
from gapfx.compare.table import Tables

DENSE, GAP, LATE = Contender("dense", "dense"), Contender("gap", "gap"), Contender("late", "gap")
STUDY = Study("task.py", "accuracy", (DENSE, GAP, LATE), (0.8, 0.9), (0, 1), ("epochs",), subject="gap")


def told(*trials: Trial) -> str:
    return story(Tables.of(STUDY, [Outcome(trial, 0.5, 1e9, 1e3, 1, 2) for trial in trials]))


def test_a_study_that_is_not_whole_says_what_is_missing() -> None:
    some = [trial for trial in STUDY.trials() if trial.contender != LATE and trial.seed == 0]
    assert told(*some).startswith(
        "3 methods, 2 seeds. 3 of 10 runs are there. None of: late. Methods of one seed share"
    )


def test_a_whole_study_says_nothing_of_it() -> None:
    assert told(*STUDY.trials()).startswith("3 methods, 2 seeds. Methods of one seed share")


def test_a_subject_is_held_against_others_pair_by_pair() -> None:
    assert "Where gap is held against another method, each pair of a sparsity and a seed" in told(*STUDY.trials())


def test_a_table_tells_of_how_many_seeds_a_difference_is_and_of_one_value_no_deviation() -> None:
    trials = [t for t in STUDY.trials() if (t.contender, t.seed) != (DENSE, 1) and (t.contender, t.seed) != (LATE, 1)]
    lines = Tables.of(STUDY, [Outcome(t, 0.5, 1e9, 1e3, 1, 2) for t in trials]).markdown().splitlines()
    dense, gap, late = (
        next(line for line in lines if line.startswith(f"| {name} |")) for name in ("dense", "gap", "late")
    )
    assert "| 0.5000 |  | 0.5000 |" in dense
    assert "| +0.0000 (1 of 2 seeds) | 1.00 |" in gap
    assert "| +0.0000 | 1.00 |" in late
