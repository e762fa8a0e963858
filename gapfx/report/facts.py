"""What the report says of a run: the facts of the headline, the state of every weight, the story in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gapfx.direction import is_lower_better
from gapfx.quantities import format_bytes, format_count, format_integer, format_number, format_seconds, format_share
from gapfx.report.read_run import Run, Span, number, record

METHODS = {
    "gap": "grow-and-prune",
    "pgap": "parallel grow-and-prune",
    "rgap": "grow-and-prune in random order",
    "acdc": "AC/DC",
    "gmp": "gradual magnitude pruning",
    "oneshot": "one-shot pruning",
    "set": "SET",
    "rigl": "RigL",
    "static": "fixed random masks",
    "dense": "dense training, the control",
}


@dataclass(frozen=True)
class Fact:
    """One number of the headline, what it is, and a line below it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class WeightState:
    """One planned weight as it is now; `kept` is None while nobody has counted.

    `is_grown`: dense for the moment, in a run that is not finished.
    """

    fqn: str
    group: str
    numel: int
    kept: int | None
    shape: tuple[int, ...] | None = None
    target: float | None = None
    is_grown: bool = False

    @property
    def sparsity(self) -> float | None:
        """Share of zeros."""
        return None if self.kept is None or not self.numel else 1 - self.kept / self.numel


def weight_states(run: Run) -> tuple[WeightState, ...]:
    """Every planned weight in the plan's order: from the summary, else from the prunes so far.

    A weight that is pruned under one threshold with others has no target of its own.
    """
    pools = [pool for group in run.plan.groups for pool in run.plan.pools(group)] if run.plan else []
    has_target = {weight.fqn: len(pool) == 1 for pool in pools for weight in pool}
    counted = {fqn: record(facts) for fqn, facts in record((run.summary or {}).get("per_weight")).items()}
    kept, grown = _kept_so_far(run), _grown_now(run)
    if run.plan is None:
        return tuple(
            WeightState(fqn, str(facts.get("group", "")), _int(facts, "numel") or 0, _int(facts, "kept"))
            for fqn, facts in counted.items()
        )
    return tuple(
        WeightState(
            weight.fqn,
            group.name,
            weight.numel,
            _int(counted.get(weight.fqn, {}), "kept") if run.is_finished else kept.get(weight.fqn),
            weight.shape,
            weight.sparsity if has_target[weight.fqn] else None,
            group.name in grown,
        )
        for group in run.plan.groups
        for weight in group.weights
    )


def headline(run: Run) -> tuple[Fact, ...]:
    """The three facts that matter: the metric, the sparsity, the size."""
    return (_metric_fact(run), _sparsity_fact(run), _size_fact(run))


def metric_names(run: Run) -> tuple[str, ...]:
    """Metrics of the run, the leading one first: the first that is not a loss."""
    names = dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.metrics)
    names |= dict.fromkeys(record(record((run.summary or {}).get("metrics")).get("final")))
    return tuple(sorted(names, key=lambda name: "loss" in name.lower()))


def best_of(run: Run, name: str) -> tuple[int, float] | None:
    """Step and value of the best evaluation while every group was sparse; None for an unfinished run.

    A value from when a group was dense says nothing of the sparse model. Metrics named like a loss or an error are
    better when lower.
    """
    if not run.is_finished:
        return None
    measured = [e for e in run.evaluations if name in e.metrics]
    sparsest = max((e.sparsity for e in measured if e.sparsity is not None), default=None)
    values = [(e.step, e.metrics[name]) for e in measured if sparsest is None or e.sparsity == sparsest]
    pick = min if is_lower_better(name) else max
    return pick(values, key=lambda item: item[1], default=None)


def story(run: Run) -> str:
    """One or two sentences: how it was trained, how long, on what."""
    method = str(run.fact("method") or (run.plan.method if run.plan else "unknown"))
    turns = [span.round for span in run.spans if span.grow and span.prune]
    parts = [f"Method: {METHODS.get(method, method)}"]
    if len(turns) > 1:
        num_groups = len(run.group_names)
        parts[0] += f", {_plural(len(set(turns)), 'round')} over {_plural(num_groups, 'group')}"
    parts.append(f"{format_integer(run.num_steps)} optimizer steps" + _duration(run) + _machines(run))
    if run.num_resumes:
        parts.append("Resumed once" if run.num_resumes == 1 else f"Resumed {run.num_resumes} times")
    return ". ".join(parts) + "."


def seconds_so_far(run: Run) -> float | None:
    """Seconds of the whole run, or up to the last logged step."""
    logged = [step.seconds for step in run.steps if step.seconds is not None]
    return number((run.summary or {}).get("seconds")) or (logged[-1] if logged else None)


def file_sizes(run: Run) -> tuple[tuple[str, int], ...]:
    """The model files that the run left behind, in bytes."""
    paths = [run.path / name for name in ("model.safetensors", "model.gapfx")]
    return tuple((path.name, path.stat().st_size) for path in paths if path.is_file())


def state_line(run: Run) -> str:
    """Where an unfinished run is; empty for a finished one."""
    if run.is_finished:
        return ""
    where = f"step {run.last_step:,}" + (f" of {run.num_steps:,}" if run.num_steps else "")
    share = f" ({100 * run.last_step / run.num_steps:.0f} %)" if run.num_steps else ""
    span = _current_span(run)
    return f"{where}{share}" + (f", in phase \u201c{span.name}\u201d" if span else "")


def _metric_fact(run: Run) -> Fact:
    names = metric_names(run)
    if not names:
        losses = [step for step in run.steps if step.loss is not None]
        value, detail = (losses[-1].loss, f"at step {losses[-1].step:,}") if losses else (None, "nothing measured yet")
        return Fact("Last training loss", format_number(value), f"{detail}; no evaluation")
    name = names[0]
    values = {e.step: e.metrics[name] for e in run.evaluations if name in e.metrics}
    summary_metrics = record((run.summary or {}).get("metrics"))
    final = number(record(summary_metrics.get("final")).get(name))
    if final is None and values:
        final = list(values.values())[-1]
    best = best_of(run, name)
    detail = f"best while sparse {format_number(best[1])}, at step {best[0]:,}" if best else ""
    if not run.is_finished and values:
        detail = f"at step {max(values):,}"
    return Fact(f"{'Final' if run.is_finished else 'Latest'} {name}", format_number(final), detail)


def _sparsity_fact(run: Run) -> Fact:
    target = number(run.fact("sparsity_target"))
    if target is None and run.plan is not None:
        target = run.plan.sparsity
    actual = number((run.summary or {}).get("sparsity_actual"))
    if not run.is_finished:
        seen = [evaluation.sparsity for evaluation in run.evaluations if evaluation.sparsity is not None]
        actual = seen[-1] if seen else None
    whole = number((run.summary or {}).get("sparsity_model"))
    model = f"; {format_share(whole)} of the whole model" if whole is not None else ""
    label = "Sparsity" if run.is_finished else "Sparsity at the last evaluation"
    return Fact(label, format_share(actual), f"target {format_share(target)}{model}")


def _size_fact(run: Run) -> Fact:
    states = weight_states(run)
    total = sum(state.numel for state in states)
    kept = None if any(state.kept is None for state in states) else sum(state.kept or 0 for state in states)
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in file_sizes(run))
    detail = f"of {format_count(total)} planned" + (f"; {sizes}" if sizes else "")
    return Fact("Weights kept", format_count(kept if states else None), detail)


def _kept_so_far(run: Run) -> dict[str, int]:
    """FQN -> live weights now, for an unfinished run: grown groups are whole, others as their last prune left them."""
    kept = {weight.fqn: weight.kept for prune in run.prunes for weight in prune.weights}
    grown = [group for group in run.plan.groups if group.name in _grown_now(run)] if run.plan else []
    return kept | {weight.fqn: weight.numel for group in grown for weight in group.weights}


def _grown_now(run: Run) -> tuple[str, ...]:
    """Groups that are dense at the last step of an unfinished run."""
    current = None if run.is_finished else _current_span(run)
    return current.grow if current else ()


def _current_span(run: Run) -> Span | None:
    return next((span for span in run.spans if span.start <= run.last_step < span.stop), None)


def _duration(run: Run) -> str:
    seconds = seconds_so_far(run)
    return "" if seconds is None else f" in {format_seconds(seconds)}" + ("" if run.is_finished else " so far")


def _machines(run: Run) -> str:
    world, stage = number(run.fact("world_size")), number(run.fact("zero_stage"))
    ranks = "" if world is None else f" on {_plural(int(world), 'rank')}"
    return ranks + ("" if stage is None else f", ZeRO {int(stage)}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def _int(facts: Mapping[str, object], key: str) -> int | None:
    value = number(facts.get(key))
    return None if value is None else int(value)
