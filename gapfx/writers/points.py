"""Events of a run as named numbers and texts at a step: what curves are drawn from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gapfx.plan import Plan

Event = Mapping[str, Any]
MIB = 2**20


@dataclass(frozen=True)
class Points:
    """What one event says at a step. A tag comes with the same step once, but for `note`."""

    step: int
    scalars: Mapping[str, float] = field(default_factory=dict[str, float])
    texts: Mapping[str, str] = field(default_factory=dict[str, str])


class Reader:
    """Reads events in their order: what some say depends on those before.

    Evaluations are `eval/METRIC`; right after a prune, when the model is sparse, `pruned/METRIC`. Steps a second are
    told where nothing but steps and checkpoints lies between two lines.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._group_of = plan, plan.group_of()
        self._sparsity: float | None = None
        self._pruned_at = -1
        self._last_line: tuple[int, float] | None = None

    def read(self, event: Event) -> Points:
        """Numbers and texts of the next event; none of one that says nothing by number."""
        of_kind = getattr(self, f"_of_{event['event']}", None)
        return of_kind(event) if of_kind else Points(event["step"])

    def _of_start(self, event: Event) -> Points:
        text = f"{event['method']}: {event['num_steps']} steps in {event['phases']} phases, {event['world_size']} ranks"
        return Points(event["step"], texts={"run": text})

    def _of_end(self, event: Event) -> Points:
        return Points(event["step"], texts={"run": f"ended after {event['seconds']:.0f} s"})

    def _of_phase(self, event: Event) -> Points:
        self._sparsity, self._last_line = event["sparsity"], None
        place = f"{event['phase'] + 1}/{len(self._plan.phases)} {event['name']}"
        changes = [f"{verb} {', '.join(event[key])}" for verb, key in _CHANGES.items() if event[key]]
        return Points(event["step"], texts={"phase": "; ".join([place, *changes])})

    def _of_step(self, event: Event) -> Points:
        step, seconds = event["step"], event["seconds"]
        scalars = {f"train/{name}": float(event[name]) for name in _OF_STEPS if name in event}
        if self._last_line is not None and seconds > self._last_line[1]:
            before, began = self._last_line
            scalars["speed/steps_per_second"] = (step - before) / (seconds - began)
        if self._sparsity is not None:
            scalars["sparsity/all"] = self._sparsity
        self._last_line = step, seconds
        return Points(step, scalars)

    def _of_eval(self, event: Event) -> Points:
        self._last_line = None
        kind = "pruned" if event["step"] == self._pruned_at else "eval"
        return Points(event["step"], {f"{kind}/{name}": value for name, value in event["metrics"].items()})

    def _of_prune(self, event: Event) -> Points:
        self._last_line, self._pruned_at = None, event["step"]
        numel, kept = defaultdict[str, int](int), defaultdict[str, int](int)
        for fqn, facts in event["weights"].items():
            name = self._plan.groups[self._group_of[fqn]].name
            numel[name] += facts["numel"]
            kept[name] += facts["kept"]
        scalars = {f"sparsity/group/{name}": 1 - kept[name] / numel[name] for name in numel}
        return Points(event["step"], {**scalars, "explored": event["explored"]})

    def _of_checkpoint(self, event: Event) -> Points:
        peaks = event.get("peak_rss_bytes_by_rank")
        return Points(event["step"], {"memory/peak_mib": max(peaks) / MIB} if peaks else {})

    def _of_resume(self, event: Event) -> Points:
        self._last_line = None
        return Points(event["step"], texts={"note": f"resumed at step {event['step']}"})

    def _of_fallback(self, event: Event) -> Points:
        return Points(event["step"], texts={"note": event["problem"]})

    _of_warning = _of_fallback


def read_all(plan: Plan, events: Iterable[Event]) -> list[Points]:
    """Points of each event from the start of a run on."""
    reader = Reader(plan)
    return [reader.read(event) for event in events]


_OF_STEPS = ("loss", "lr", "grad_norm")  # runs that are older have not all of them
_CHANGES = {"grows": "grow", "prunes": "prune"}
