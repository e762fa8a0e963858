"""A study: what is compared, as a small TOML file says it."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gapfx.direction import is_lower_better
from gapfx.errors import UserError
from gapfx.method_settings import check_read
from gapfx.schedule import SCHEDULES
from gapfx.settings import Settings

Budget = Literal["epochs", "flops"]
CONTROL = "dense"
SETTING_NAMES = tuple(each.name for each in dataclasses.fields(Settings))
_OWN = {
    "method": "methods, and method in a table [method.NAME]",
    "sparsity": "sparsities",
    "seed": "seeds",
    "test": "test",
}
_KEYS = (
    "task",
    "entry",
    "metric",
    "lower_is_better",
    "also",
    "methods",
    "sparsities",
    "seeds",
    "budgets",
    "flops",
    "test",
    "subject",
    "tune",
    "settings",
    "method",
)


@dataclass(frozen=True)
class Contender:
    """One row of the comparison: a method with settings of its own, under a name of its own."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Trial:
    """One run. The control has sparsity 0; `candidate` is the factor of the learning rate that a tuning run tries."""

    contender: Contender
    sparsity: float
    seed: int
    budget: Budget
    candidate: float | None = None

    @property
    def name(self) -> str:
        """Name of its run directory."""
        last = self.budget if self.candidate is None else f"lr{self.candidate:g}"
        return f"{self.contender.name}-{self.sparsity:g}-{self.seed}-{last}"


@dataclass(frozen=True)
class Tuning:
    """Learning rates that every contender tries, at one sparsity, with a seed that the study itself does not use."""

    lr_scale: tuple[float, ...]
    sparsity: float
    seed: int


@dataclass(frozen=True)
class Study:
    """What the file says. `settings` are those of every run; `metric` is one of the task's evaluate().

    Whether less of the metric is better goes by its name where the file does not say.

    Means of the metrics `also` stand beside it in the tables.
    `flops` is the share of the control's operations at equal epochs that each run gets at equal operations. With
    `test` runs are judged on `data("test")`, which each of them sees once, at its end. `subject` is a contender that
    all others are held against. `tune` says how each contender gets its learning rate.
    """

    task: str
    metric: str
    contenders: tuple[Contender, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    budgets: tuple[Budget, ...] = ("epochs", "flops")
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    flops: float = 1.0
    test: bool = False
    subject: str = ""
    tune: Tuning | None = None
    also: tuple[str, ...] = ()
    is_lower_better: bool = False

    def trials(self) -> Iterator[Trial]:
        """Every run, seed by seed; the control once a seed where its operations are the budget of the others.

        Those of equal epochs come first: from some the operations of the others are known.
        """
        for seed, budget in itertools.product(self.seeds, sorted(self.budgets)):
            for contender in self.contenders:
                if contender.method != CONTROL:
                    yield from (Trial(contender, sparsity, seed, budget) for sparsity in self.sparsities)
                elif self.control_budget(budget) == budget:
                    yield Trial(contender, 0.0, seed, budget)

    def control_budget(self, budget: Budget) -> Budget:
        """Under which budget the control that stands beside runs of this one was trained."""
        return self.budgets[0] if self.flops == 1 else budget

    def tuning_trials(self) -> Iterator[Trial]:
        """The runs that choose learning rates, judged on the validation data."""
        tune = self.tune
        for contender, lr_scale in itertools.product(self.contenders, tune.lr_scale if tune else ()):
            assert tune is not None
            sparsity = 0.0 if contender.method == CONTROL else tune.sparsity
            yield Trial(contender, sparsity, tune.seed, "epochs", lr_scale)

    def tuned(self, lr_scale: Mapping[str, float]) -> Study:
        """The study with a factor of the learning rate for each contender, by name; those without one stay."""
        chosen = (
            dataclasses.replace(c, settings={**c.settings, "lr_scale": lr_scale[c.name]}) if c.name in lr_scale else c
            for c in self.contenders
        )
        return dataclasses.replace(self, contenders=tuple(chosen))


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
        budgets=tuple(_list(facts, "budgets", str, where)) if "budgets" in facts else get_args(Budget),
        settings=_settings(_table(facts, "settings", path), f"{where}: [settings]"),
        flops=_number(facts.get("flops", 1.0), "flops", where),
        test=_flag(facts.get("test", False), "test", where),
        subject=_text(facts, "subject", where) if "subject" in facts else "",
        tune=_tuning(_table(facts, "tune", path), where) if "tune" in facts else None,
        also=tuple(_list(facts, "also", str, where)) if "also" in facts else (),
        is_lower_better=_flag(
            facts.get("lower_is_better", is_lower_better(str(facts["metric"]))), "lower_is_better", where
        ),
    )
    _check(study, where)
    return study


def _contender(name: str, own: object, where: str) -> Contender:
    if not isinstance(own, dict):
        raise UserError(f"method.{name} is no table", where=where, fix=f"write [method.{name}]")
    settings = dict(cast(dict[str, Any], own))
    method = settings.pop("method", name)
    _settings(settings, f"{where}: [method.{name}]")
    SCHEDULES[method]  # raises for a method that there is not
    check_read(method, settings, f"{where}: [method.{name}]")
    return Contender(name, method, settings)


def _settings(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The given settings, each of them one of a run that the study does not give itself."""
    for name in given:
        if name in _OWN:
            raise UserError(f"{name} is for the study to say", where=where, fix=f"take it out: see {_OWN[name]}")
        if name not in SETTING_NAMES:
            near = difflib.get_close_matches(name, SETTING_NAMES, n=1)
            fix = (
                f"did you mean {near[0]!r}?" if near else "`gapfx sparsify --help` names all: phase_epochs, groups, ..."
            )
            raise UserError(f"there is no setting {name!r}", where=where, fix=fix)
    return given


def _tuning(facts: Mapping[str, Any], where: str) -> Tuning:
    if set(facts) != {"lr_scale", "sparsity", "seed"}:
        raise UserError(
            f"[tune] holds {', '.join(sorted(facts)) or 'nothing'}",
            where=where,
            fix="write lr_scale = [0.5, 1, 2], sparsity = 0.9 and seed = 100",
        )
    scales = tuple(_number(scale, "tune.lr_scale", where) for scale in _list(facts, "lr_scale", (int, float), where))
    return Tuning(scales, _number(facts["sparsity"], "tune.sparsity", where), _seed(facts["seed"], where))


def _seed(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"tune.seed is {value!r}", where=where, fix="give a whole number, such as 100")
    return value


def _check(study: Study, where: str) -> None:
    wrong = [budget for budget in study.budgets if budget not in get_args(Budget)]
    if wrong or not study.budgets:
        raise UserError(f"budgets are {list(study.budgets)}", where=where, fix='give some of "epochs", "flops"')
    tune = study.tune
    if any(not 0 < sparsity < 1 for sparsity in (*study.sparsities, *([tune.sparsity] if tune else []))):
        raise UserError(f"sparsities are {list(study.sparsities)}", where=where, fix="each is in (0, 1), such as 0.9")
    lists: dict[str, Sequence[object]] = {"methods": study.contenders, "budgets": study.budgets}
    lists |= {"seeds": study.seeds, "sparsities": study.sparsities}
    lists |= {"tune.lr_scale": tune.lr_scale} if tune else {}
    for key, values in lists.items():
        if len(set(map(repr, values))) < len(values) or not values:
            raise UserError(f"{key} are empty or name one twice", where=where, fix="name each once")
    if tune and tune.seed in study.seeds:
        raise UserError(
            f"tune.seed {tune.seed} is one of the study's", where=where, fix="tune with a seed of its own, such as 100"
        )
    if study.subject and study.subject not in [contender.name for contender in study.contenders]:
        raise UserError(f"the subject {study.subject!r} is not in methods", where=where, fix="name one of methods")
    if "flops" in study.budgets and not any(contender.method == CONTROL for contender in study.contenders):
        raise UserError(
            "equal operations are a share of those of the method dense, which is missing",
            where=where,
            fix='add "dense" to methods, or give budgets = ["epochs"]',
        )


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"{key} is {value!r}", where=where, fix="give a number above 0")
    return float(value)


def _flag(value: object, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}", where=where, fix="give true or false")
    return value


def _text(facts: Mapping[str, Any], key: str, where: str) -> str:
    value = facts.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} is {value!r}", where=where, fix=f'write {key} = "..."')
    return value


def _list(facts: Mapping[str, Any], key: str, kind: Any, where: str) -> list[Any]:
    value = facts.get(key)
    if not isinstance(value, list) or not all(_is_a(kind, each) for each in cast(list[Any], value)):
        raise UserError(f"{key} is {value!r}", where=where, fix=f"write {key} = [...]")
    return cast(list[Any], value)


def _is_a(kind: Any, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python takes for a number


def _table(facts: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = facts.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{key} is no table", where=str(path), fix=f"write [{key}]")
    return cast(Mapping[str, Any], value)
