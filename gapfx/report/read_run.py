"""What a run directory says, read with patience: files may be missing, half written or of a run that still trains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gapfx.errors import PlanError, UserError
from gapfx.plan import Plan

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """Steps `start <= step < stop` of one phase, with the names of the groups that it grows and prunes.

    Each of its replicas grows a part of them, as `Phase.grown_by` says.
    """

    name: str
    start: int
    stop: int
    grow: tuple[str, ...] = ()
    prune: tuple[str, ...] = ()
    round: int = 0
    replicas: int = 1

    def dense_at_once(self) -> list[tuple[str, ...]]:
        """The groups that each replica grows."""
        return [self.grow[replica :: self.replicas] for replica in range(self.replicas)]


@dataclass(frozen=True)
class PrunedWeight:
    """One weight at one prune; `changed_bits` against the mask before its group was grown."""

    fqn: str
    numel: int
    kept: int
    changed_bits: int | None
    delta2: float | None


@dataclass(frozen=True)
class Prune:
    """One prune: the groups, their weights, and the share of planned weights that was ever live until then."""

    step: int
    groups: tuple[str, ...]
    weights: tuple[PrunedWeight, ...]
    explored: float | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation after `step` steps, with the sparsity over the planned weights at that moment."""

    step: int
    metrics: Mapping[str, float]
    sparsity: float | None


@dataclass(frozen=True)
class TrainingStep:
    """One logged optimizer step; values that were not finite are None."""

    step: int
    loss: float | None
    lr: float | None
    seconds: float | None


@dataclass(frozen=True)
class Run:
    """A run directory. `notes` say what was missing or unreadable, `summary` is None until the run is finished."""

    path: Path
    config: Record
    plan: Plan | None
    summary: Record | None
    start: Record
    spans: tuple[Span, ...]
    steps: tuple[TrainingStep, ...]
    evaluations: tuple[Evaluation, ...]
    prunes: tuple[Prune, ...]
    num_steps: int
    last_step: int
    num_resumes: int
    notes: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote its summary."""
        return self.summary is not None

    @property
    def group_names(self) -> tuple[str, ...]:
        """Groups in their order."""
        if self.plan is not None:
            return tuple(group.name for group in self.plan.groups)
        return tuple(dict.fromkeys(name for span in self.spans for name in (*span.grow, *span.prune)))

    def fact(self, key: str) -> Any:
        """A fact from the summary, else from the start of the log, else from the settings; None when unknown."""
        return next((source[key] for source in (self.summary or {}, self.start, self.config) if key in source), None)


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError when the folder holds no run at all."""
    names = ("config.json", "plan.json", "metrics.jsonl", "summary.json")
    if not any((path / name).is_file() for name in names):
        raise UserError(f"{path} is not a run directory", fix=f"give a folder with {', '.join(names)}")
    notes: list[str] = []
    config, summary = (_read_object(path / name, notes) for name in ("config.json", "summary.json"))
    plan = _read_plan(path / "plan.json", notes)
    events = _without_repeats(_read_events(path / "metrics.jsonl", notes))
    spans = _planned_spans(plan) if plan is not None and plan.phases else _seen_spans(events)
    start = next((event for event in events if event["event"] == "start"), {})
    return Run(
        path=path,
        config=config or {},
        plan=plan,
        summary=summary,
        start=start,
        spans=spans,
        steps=tuple(_training_step(event) for event in events if event["event"] == "step"),
        evaluations=tuple(_evaluation(event) for event in events if event["event"] == "eval"),
        prunes=tuple(_prune(event) for event in events if event["event"] == "prune"),
        num_steps=max([_whole(start.get("num_steps")) or 0, *(span.stop for span in spans)]),
        last_step=max((event["step"] for event in events), default=0),
        num_resumes=sum(event["event"] == "resume" for event in events),
        notes=tuple(notes),
    )


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def record(value: object) -> Record:
    """A JSON object, or an empty one."""
    return cast(Record, value) if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    finite = number(value)
    return None if finite is None else int(finite)


def _names(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in cast(list[object], value)) if isinstance(value, list) else ()


def _read_object(path: Path, notes: list[str]) -> Record | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        notes.append(f"{path.name} could not be read")
        return None
    return cast(Record, data)


def _read_plan(path: Path, notes: list[str]) -> Plan | None:
    if not path.is_file():
        return None
    try:
        return Plan.load(path)
    except PlanError as error:
        notes.append(f"plan.json could not be read: {error.what}")
        return None


def _read_events(path: Path, notes: list[str]) -> list[Record]:
    """Every whole line that has an event and a step; a last line that was cut short is left out in silence."""
    try:
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    except OSError as error:
        notes.append(f"metrics.jsonl could not be read: {error.strerror}")
        lines = []
    events: list[Record] = []
    num_bad = 0
    for index, line in enumerate(lines):
        event = _parse_event(line)
        if event is not None:
            events.append(event)
        elif line.strip() and index < len(lines) - 1:
            num_bad += 1
    if num_bad:
        notes.append(f"{num_bad} {'line' if num_bad == 1 else 'lines'} of metrics.jsonl could not be read")
    return events


def _parse_event(line: str) -> Record | None:
    try:
        event = record(json.loads(line))
    except (ValueError, RecursionError):
        return None
    step = _whole(event.get("step"))
    return {**event, "step": step} if isinstance(event.get("event"), str) and step is not None else None


def _without_repeats(events: Iterable[Record]) -> list[Record]:
    """A resume repeats steps: what was logged past it is superseded, and the last of two equal entries counts."""
    kept: dict[tuple[object, ...], Record] = {}
    for event in events:
        if event["event"] == "resume":
            kept = {key: old for key, old in kept.items() if old["step"] <= event["step"] or old["event"] == "resume"}
        groups = _names(event.get("groups"))
        number_of_resume = len(kept) if event["event"] == "resume" else None
        kept[(event["event"], event["step"], groups, number_of_resume)] = event
    return list(kept.values())


def _planned_spans(plan: Plan) -> tuple[Span, ...]:
    names = [group.name for group in plan.groups]
    return tuple(
        Span(
            phase.name,
            phase.start,
            phase.stop,
            tuple(names[index] for index in phase.grow),
            tuple(names[index] for index in phase.prune),
            phase.round,
            phase.replicas,
        )
        for phase in plan.phases
    )


def _seen_spans(events: Iterable[Record]) -> tuple[Span, ...]:
    phases = [
        event for event in events if event["event"] == "phase" and (_whole(event.get("stop")) or 0) > event["step"]
    ]
    return tuple(
        Span(
            str(phase.get("name", "phase")),
            phase["step"],
            int(phase["stop"]),
            _names(phase.get("grow")),
            _names(phase.get("prune")),
            _whole(phase.get("round")) or 0,
        )
        for phase in phases
    )


def _training_step(event: Record) -> TrainingStep:
    return TrainingStep(event["step"], number(event.get("loss")), number(event.get("lr")), number(event.get("seconds")))


def _evaluation(event: Record) -> Evaluation:
    metrics = {str(name): number(value) for name, value in record(event.get("metrics")).items()}
    finite = {name: value for name, value in metrics.items() if value is not None}
    return Evaluation(event["step"], finite, number(event.get("sparsity")))


def _prune(event: Record) -> Prune:
    weights = [
        PrunedWeight(
            str(fqn),
            _whole(facts.get("numel")) or 0,
            _whole(facts.get("kept")) or 0,
            _whole(facts.get("changed_bits")),
            number(facts.get("delta2")),
        )
        for fqn, value in record(event.get("weights")).items()
        for facts in (record(value),)
    ]
    return Prune(event["step"], _names(event.get("groups")), tuple(weights), number(event.get("explored")))
