"""From the runs of a study to its tables: learning rates first, where they are tuned, then what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from gapfx.compare.outcomes import Outcome, best_lr_scales, recorded
from gapfx.compare.records import Records
from gapfx.compare.study import Study, Trial, read_study
from gapfx.compare.table import Tables
from gapfx.errors import UserError

Find = Callable[[Iterable[Trial]], Iterable[Outcome]]


def judge(study: Study, find: Find, out: Path) -> Tables:
    """The tables of the outcomes that `find` has of trials. Raises UserError when none is finished in `out`."""
    if study.tune:
        study = study.tuned(best_lr_scales(study, find(study.tuning_trials())))
    outcomes = list(find(study.trials()))
    if not outcomes:
        raise UserError(f"no run of the study is finished in {out}", fix="leave --collect out to train them")
    return Tables.of(study, outcomes)


def collected(path: Path, folder: Path) -> Tables:
    """The tables of a study file from the records in `folder`, without training or loading the task."""
    study, records = read_study(path), Records.read(folder)
    return judge(study, lambda trials: recorded(study, trials, records), folder)
