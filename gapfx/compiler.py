"""Passes over one captured model: analyses answer questions about it, rewrites change the graphs of its owners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from gapfx import options
from gapfx.capture import Capture, EvalReads
from gapfx.errors import PassError, UserError
from gapfx.owners import NOTHING_READ, Owner, build_owners
from gapfx.realise import realise_owners
from gapfx.registry import Registry
from gapfx.text import format_graph

FactT = TypeVar("FactT")
PassT = TypeVar("PassT", bound="type[Pass]")
Observer = Callable[[str, str, str, int, int], object]


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler; subclasses are frozen dataclasses whose fields are its options.

    Raises UserError for an option value of the wrong type.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the options; a subclass that adds checks calls this first."""
        options.check(self, self.name)

    def __str__(self) -> str:
        """Name and options as `parse_pipeline` reads them."""
        return self.name + options.to_text(self)


class Analysis(Pass, Generic[FactT]):
    """A question about the unit; its fact is computed once for each frozen instance and changes nothing.

    Others ask for it by `unit.latest(Kind)`, or by `unit.fact(Kind(...))` with options of their own.
    """

    @abstractmethod
    def compute(self, unit: Unit) -> FactT:
        """The fact, asking the unit for the facts that it needs."""


class Rewrite(Pass):
    """A change of owner graphs.

    Facts of analyses that are not in the class variable `preserves` are forgotten after a change.
    """

    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = ()

    @abstractmethod
    def apply(self, unit: Unit) -> bool:
        """Rewrite the graphs in `unit.owners`; True where anything changed. Weights left out go to `unit.refuse`."""


PASSES: Registry[type[Pass]] = Registry("pass")


def register(cls: PassT) -> PassT:
    """Class decorator: puts a pass into PASSES under its `name`."""
    PASSES.add(cls.name, cls)
    return cls


@dataclass(frozen=True)
class _Fact:
    value: Any
    needs: frozenset[type[Analysis[Any]]]


@dataclass
class Unit:
    """A capture, the graphs of its owners, and everything that analyses found out about it.

    `refusals` are (fqn, reason) of weights that a rewrite left alone; `in_eval` are reads of the forward in eval.
    """

    capture: Capture
    in_eval: EvalReads = NOTHING_READ
    refusals: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    _chosen: dict[type[Analysis[Any]], Analysis[Any]] = field(default_factory=dict[Any, Any])
    _assumed: dict[type[Analysis[Any]], Any] = field(default_factory=dict[Any, Any])
    _facts: dict[Analysis[Any], _Fact] = field(default_factory=dict[Any, Any])
    _computing: dict[Analysis[Any], set[type[Analysis[Any]]]] = field(default_factory=dict[Any, Any])

    @cached_property
    def owners(self) -> dict[str, Owner]:
        """One owner for each module that holds a weight of a matrix product, a convolution or an embedding."""
        return build_owners(self.capture, self.in_eval)

    def fact(self, analysis: Analysis[FactT]) -> FactT:
        """What this very instance finds; computed at the first question."""
        if analysis in self._computing:
            chain = " -> ".join(item.name for item in (*self._computing, analysis))
            raise PassError(f"analyses ask each other in a circle: {chain}")
        if analysis not in self._facts:
            self._computing[analysis] = set()
            try:
                value = analysis.compute(self)
            finally:
                needs = frozenset(self._computing.pop(analysis))
            self._facts[analysis] = _Fact(value, needs)
        found = self._facts[analysis]
        self._note(*found.needs)
        return cast(FactT, found.value)

    def latest(self, kind: type[Analysis[FactT]]) -> FactT:
        """What the chosen instance of an analysis finds, or what was assumed in its place."""
        self._note(kind)
        return self._assumed[kind] if kind in self._assumed else self.fact(self.chosen(kind))

    def chosen(self, kind: type[Analysis[FactT]]) -> Analysis[FactT]:
        """The instance that `latest` answers with: the last one chosen, else the one with default options."""
        self._note(kind)
        found = self._chosen.get(kind) or _default(kind)
        if found is None:
            raise PassError(f"the analysis {kind.name} has options without defaults and was not chosen")
        return found

    def choose(self, analysis: Analysis[Any]) -> None:
        """Let `latest` answer with this instance, and forget what rested on another choice or an assumption."""
        kind = type(analysis)
        if kind in self._assumed or analysis != (self._chosen.get(kind) or _default(kind)):
            self._forget_users(kind)
        self._chosen[kind] = analysis
        self._assumed.pop(kind, None)

    def assume(self, kind: type[Analysis[FactT]], fact: FactT) -> None:
        """Let `latest` answer with a fact given by hand, such as a plan from a file, until another choice."""
        self._forget_users(kind)
        self._assumed[kind] = fact

    def forget(self, preserved: Sequence[type[Analysis[Any]]] = ()) -> None:
        """Forget every computed fact but those of the preserved analyses; assumptions stay."""
        self._facts = {analysis: fact for analysis, fact in self._facts.items() if type(analysis) in preserved}

    def refuse(self, fqn: str, reason: str) -> None:
        """Remember, once, that a rewrite left a weight alone."""
        if (fqn, reason) not in self.refusals:
            self.refusals.append((fqn, reason))

    def text(self) -> str:
        """Every owner graph as stable text."""
        heads = (f"{fqn or '(root)'}: {type(owner.module).__name__}, form {owner.form}" for fqn, owner in self._named())
        graphs = (format_graph(owner.graph) for _, owner in self._named())
        return "\n".join(f"{head}\n{graph}" for head, graph in zip(heads, graphs, strict=True))

    def num_nodes(self) -> int:
        """Nodes of all owner graphs together."""
        return sum(len(owner.graph.graph.nodes) for owner in self.owners.values())

    def _named(self) -> list[tuple[str, Owner]]:
        return list(self.owners.items())

    def _note(self, *kinds: type[Analysis[Any]]) -> None:
        for needs in self._computing.values():
            needs.update(kinds)

    def _forget_users(self, kind: type[Analysis[Any]]) -> None:
        self._facts = {analysis: fact for analysis, fact in self._facts.items() if kind not in fact.needs}


class Watcher(Protocol):
    """Looks on while a unit is compiled, and changes nothing."""

    def begin(self, unit: Unit) -> object:
        """Before any pass, but with its options chosen."""

    def after(self, name: str, unit: Unit) -> object:
        """After the pass of that name."""


def _default(kind: type[Analysis[FactT]]) -> Analysis[FactT] | None:
    required = [item for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    return None if required else kind()


def realise(unit: Unit) -> Any:
    """The model of the capture, same object, its owners following their rewritten graphs from now on."""
    realise_owners(unit.capture.model, unit.owners.values())
    return unit.capture.model


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `observer` is told (pass name, text before, text after, nodes before, nodes after).

    `watchers` see the unit that each pass leaves.
    """

    passes: tuple[Pass, ...]
    observer: Observer | None = None
    watchers: tuple[Watcher, ...] = ()

    def run(self, unit: Unit) -> Unit:
        """Run every pass on the unit and give it back.

        Raises PassError that names the failed pass and those before it; a UserError passes through unchanged.
        """
        for index, step in enumerate(self.passes):
            try:
                self._run_one(step, unit)
            except UserError:
                raise
            except Exception as error:
                before = ", ".join(str(done) for done in self.passes[:index]) or "none"
                reason = f"{type(error).__name__}: {error}"
                raise PassError(f"the pass {step} failed: {reason}\n  passes before it: {before}") from error
        return unit

    def _run_one(self, step: Pass, unit: Unit) -> None:
        before = (unit.text(), unit.num_nodes()) if self.observer else ("", 0)
        if isinstance(step, Analysis):
            analysis = cast(Analysis[Any], step)
            unit.choose(analysis)
            unit.fact(analysis)
        elif isinstance(step, Rewrite) and step.apply(unit):
            unit.forget(step.preserves)
            for owner in unit.owners.values():
                owner.graph.graph.lint()
                owner.graph.recompile()
        if self.observer:
            self.observer(step.name, before[0], unit.text(), before[1], unit.num_nodes())
        for watcher in self.watchers:
            watcher.after(step.name, unit)


def parse_pipeline(text: str, observer: Observer | None = None) -> Pipeline:
    """`partition{groups=4,strategy=blocks},insert-masks` -> the pipeline; tuples are written a+b.

    Raises UserError for unknown passes and options, listing the known ones.
    """
    passes = [_make(name, values) for name, values in options.split_passes(text)]
    return Pipeline(tuple(passes), observer)


def _make(name: str, values: dict[str, str]) -> Pass:
    cls = PASSES[name]
    return cls(**options.from_text(cls, values, name))
