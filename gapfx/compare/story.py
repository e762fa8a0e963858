"""How a study was made, and what of it is there, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from gapfx.compare.study import Tuning
from gapfx.compare.table import Tables


def story(tables: Tables) -> str:
    """One paragraph for the page of a study."""
    return " ".join(_sentences(tables))


def _sentences(tables: Tables) -> Iterator[str]:
    study, num_seeds = tables.study, len(tables.study.seeds)
    yield f"{len(study.contenders)} methods, {num_seeds} seed{'s' * (num_seeds > 1)}."
    yield from _missing(tables)
    yield "Methods of one seed share initial weights and the order of data."
    if study.tune:
        yield from _tuning(study.tune, tables)
    data = "test data, which no run sees before its end," if study.test else "validation data after the last step"
    yield f"The {study.metric} is that of the {data} and p that of no difference from the dense run of the same seed,"
    yield f"by a sign-flip test: {num_seeds} seeds give at least {2 / 2**num_seeds:.2g}."
    if study.subject:
        yield f"Where {study.subject} is held against another method, each pair of a sparsity and a seed flips on its"
        yield "own, as if those of one seed had nothing in common."


def _missing(tables: Tables) -> Iterator[str]:
    """A study may be shown before it is whole."""
    study, there = tables.study, {row.name for row in tables.rows}
    num_trials = sum(1 for _ in study.trials())
    if tables.num_runs < num_trials:
        yield f"{tables.num_runs} of {num_trials} runs are there."
    without = [contender.name for contender in study.contenders if contender.name not in there]
    if without:
        yield f"None of: {', '.join(without)}."


def _tuning(tune: Tuning, tables: Tables) -> Iterator[str]:
    study, chosen = tables.study, tables.lr_scales()
    tried = ", ".join(f"{scale:g}" for scale in tune.lr_scale)
    yield f"Each method has the best of the task's learning rate times {tried}, by the {study.metric} on the validation"
    yield f"data of one run at a sparsity of {tune.sparsity:g} with seed {tune.seed}, which counts for nothing else:"
    yield ", ".join(f"{name} {scale:g}" for name, scale in chosen.items()) + "."
    ends = [name for name, scale in chosen.items() if scale in (min(tune.lr_scale), max(tune.lr_scale))]
    if ends and len(tune.lr_scale) > 1:
        yield f"At an end of what was tried: {', '.join(ends)}."
