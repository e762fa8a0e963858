"""A study: what is compared, as a small TOML file says it."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gapfx.errors import UserError
from gapfx.schedule import SCHEDULES

Budget = Literal["epochs", "flops"]
CONTROL = "dense"
_KEYS = ("task", "entry", "metric", "methods", "sparsities", "seeds", "budgets", "settings", "method")


@dataclass(frozen=True)
class Contender:
    """One row of the comparison: a method with settings of its own, under a name of its own."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Trial:
    """One run. The control has sparsity 0."""

    contender: Contender
    sparsity: float
    seed: int
    budget: Budget

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return f"{self.contender.name}-{self.sparsity:g}-{self.seed}-{self.budget}"


@dataclass(frozen=True)
class Study:
    """What the file says. `settings` are those of every run; `metric` is one of the task's evaluate()."""

    task: str
    metric: str
    contenders: tuple[Contender, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    budgets: tuple[Budget, ...] = ("epochs", "flops")
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def trials(self) -> Iterator[Trial]:
        """Every run, seed by seed; the control once a seed, as it sets the budget of the others."""
        for seed, budget in itertools.product(self.seeds, self.budgets):
            for contender in self.contenders:
                if contender.method != CONTROL:
                    yield from (Trial(contender, sparsity, seed, budget) for sparsity in self.sparsities)
                elif budget == self.budgets[0]:
                    yield Trial(contender, 0.0, seed, budget)


def read_study(path: Path) -> Study:
    """The study in a TOML file. Raises UserError that names the place of a mistake."""
    try:
        facts = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the study cannot be read: {error}", where=str(path), fix="give a TOML file") from error
    unknown = sorted(set(facts) - set(_KEYS))
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}", where=str(path), fix=f"known: {', '.join(_KEYS)}")
    where, own = str(path), _table(facts, "method", path)
    names = tuple(_list(facts, "methods", str, where))
    stray = sorted(set(own) - set(names))
    if stray:
        raise UserError(f"[method.{stray[0]}] is not in methods", where=where, fix="name it there, or delete it")
    entry = f":{facts['entry']}" if "entry" in facts else ""
    study = Study(
        task=f"{path.parent / _text(facts, 'task', where)}{entry}",
        metric=_text(facts, "metric", where),
        contenders=tuple(_contender(name, own.get(name, {}), where) for name in names),
        sparsities=tuple(float(value) for value in _list(facts, "sparsities", (int, float), where)),
        seeds=tuple(_list(facts, "seeds", int, where)),
        budgets=cast(tuple[Budget, ...], tuple(facts.get("budgets", get_args(Budget)))),
        settings=_table(facts, "settings", path),
    )
    _check(study, where)
    return study


def _contender(name: str, own: object, where: str) -> Contender:
    if not isinstance(own, dict):
        raise UserError(f"method.{name} is no table", where=where, fix=f"write [method.{name}]")
    settings = dict(cast(dict[str, Any], own))
    method = settings.pop("method", name)
    SCHEDULES[method]  # raises for a method that there is not
    return Contender(name, method, settings)


def _check(study: Study, where: str) -> None:
    wrong = [budget for budget in study.budgets if budget not in get_args(Budget)]
    if wrong or not study.budgets:
        raise UserError(f"budgets are {list(study.budgets)}", where=where, fix='give some of "epochs", "flops"')
    if any(not 0 < sparsity < 1 for sparsity in study.sparsities):
        raise UserError(f"sparsities are {list(study.sparsities)}", where=where, fix="each is in (0, 1), such as 0.9")
    for key, values in (("methods", study.contenders), ("seeds", study.seeds), ("sparsities", study.sparsities)):
        if len(set(map(repr, values))) < len(values) or not values:
            raise UserError(f"{key} are empty or name one twice", where=where, fix="name each once")
    if "flops" in study.budgets and not any(contender.method == CONTROL for contender in study.contenders):
        raise UserError(
            "equal operations are those of the method dense, which is missing",
            where=where,
            fix='add "dense" to methods, or give budgets = ["epochs"]',
        )


def _text(facts: Mapping[str, Any], key: str, where: str) -> str:
    value = facts.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} is {value!r}", where=where, fix=f'write {key} = "..."')
    return value


def _list(facts: Mapping[str, Any], key: str, kind: Any, where: str) -> list[Any]:
    value = facts.get(key)
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in cast(list[Any], value)):
        raise UserError(f"{key} is {value!r}", where=where, fix=f"write {key} = [...]")
    return cast(list[Any], value)


def _table(facts: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = facts.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{key} is no table", where=str(path), fix=f"write [{key}]")
    return cast(Mapping[str, Any], value)
