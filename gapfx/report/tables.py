"""Tables of the report: every weight, every prune, what stayed dense, settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from gapfx.quantities import format_bytes, format_integer, format_number, format_seconds, format_share
from gapfx.report.curves import legend_mark
from gapfx.report.facts import WeightState, file_sizes, seconds_so_far
from gapfx.report.markup import Markup, breakable, join, tag
from gapfx.report.read_run import Prune, Run, number, record

MAX_DENSE_ROWS = 400


def weights_table(states: Sequence[WeightState], group_names: tuple[str, ...]) -> Markup | None:
    """One row a weight, grouped, with the sums of each group in its heading row."""
    if not states:
        return None
    head = _head(("Weight", ""), ("Shape", "wide-cell"), ("Weights", "num"), ("Kept", "num"), ("Sparsity", "num"))
    bodies = [
        _group_body(group, list(members), group_names)
        for group, members in itertools.groupby(states, key=lambda state: state.group)
    ]
    total = _sums("All planned weights", states)
    return _table(head, *bodies, tag("tfoot", total))


def prunes_table(run: Run) -> Markup | None:
    """One row a prune and group: bits changed, energy lost, explored share."""
    if not run.prunes:
        return None
    head = _head(
        ("After step", "num"),
        ("Groups", ""),
        ("Kept", "num"),
        ("Bits changed", "num"),
        ("\u03b4\u00b2, mean", "num"),
        ("Explored", "num"),
    )
    return _table(head, tag("tbody", *(_prune_row(prune) for prune in run.prunes)))


def dense_table(run: Run) -> Markup | None:
    """Weights that stayed dense, and why."""
    if run.plan is None or not run.plan.dense:
        return None
    shown = run.plan.dense[:MAX_DENSE_ROWS]
    rows = [
        tag(
            "tr",
            tag("td", breakable(weight.fqn), class_="fqn"),
            tag("td", _shape(weight.shape), class_="wide-cell"),
            tag("td", weight.reason),
        )
        for weight in shown
    ]
    more = len(run.plan.dense) - len(shown)
    rows += [tag("tr", tag("td", f"and {more:,} more in plan.json", colspan=3))] if more else []
    return _table(_head(("Weight", ""), ("Shape", "wide-cell"), ("Why it stayed dense", "")), tag("tbody", *rows))


def settings_list(run: Run) -> Markup:
    """The settings of the run, in the order of config.json."""
    return _definitions((name, _setting(value)) for name, value in run.config.items())


def plan_list(run: Run) -> Markup:
    """How the plan was made."""
    plan = run.plan
    if plan is None:
        return Markup()
    patterns = dict.fromkeys(weight.pattern for weight in plan.weights())
    return _definitions(
        (
            ("method", plan.method),
            ("sparsity", format_share(plan.sparsity)),
            ("groups", str(len(plan.groups))),
            ("planned weights", str(sum(1 for _ in plan.weights()))),
            ("partition", plan.partition),
            ("allocation", plan.allocation),
            ("pattern", ", ".join(patterns)),
            ("criterion", plan.criterion),
            ("start masks", plan.start_masks),
            ("phases", str(len(plan.phases))),
        )
    )


def resources_list(run: Run) -> Markup:
    """Time, memory, ranks, files, seed."""
    facts = [
        ("time", format_seconds(seconds_so_far(run))),
        ("peak memory of a rank", format_bytes(number(run.fact("peak_rss_bytes")))),
        ("ranks", format_integer(number(run.fact("world_size")))),
        ("ZeRO stage", format_integer(number(run.fact("zero_stage")))),
        ("form", _setting(run.fact("form"))),
        ("seed", _setting(run.fact("seed"))),
        *((name, format_bytes(size)) for name, size in file_sizes(run)),
    ]
    return _definitions((name, value) for name, value in facts if value not in ("-", ""))


def versions_list(run: Run) -> Markup:
    """Versions of the software."""
    return _definitions((name, _setting(value)) for name, value in record(run.fact("versions")).items())


def _group_body(group: str, members: Sequence[WeightState], group_names: tuple[str, ...]) -> Markup:
    mark = legend_mark(group_names.index(group), len(group_names)) if group in group_names else Markup()
    count = f"{len(members)} weight{'s' if len(members) != 1 else ''}"
    name = join((mark, " ", group or "no group", tag("small", count)))
    rows = [
        tag(
            "tr",
            tag("td", breakable(state.fqn), class_="fqn"),
            tag("td", _shape(state.shape), class_="wide-cell"),
            *_counts(state.numel, state.kept),
        )
        for state in members
    ]
    return tag("tbody", _sums(name, members), *rows)


def _sums(name: str, states: Sequence[WeightState]) -> Markup:
    kept = None if any(state.kept is None for state in states) else sum(state.kept or 0 for state in states)
    cells = _counts(sum(state.numel for state in states), kept)
    return tag("tr", tag("th", name, scope="rowgroup"), tag("th", class_="wide-cell"), *cells, class_="sum")


def _counts(numel: int, kept: int | None) -> tuple[Markup, ...]:
    sparsity = None if kept is None or not numel else 1 - kept / numel
    return tuple(
        tag("td", text, class_="num") for text in (format_integer(numel), format_integer(kept), format_share(sparsity))
    )


def _prune_row(prune: Prune) -> Markup:
    numel, kept = sum(weight.numel for weight in prune.weights), sum(weight.kept for weight in prune.weights)
    compared = [(weight.changed_bits, weight.numel) for weight in prune.weights if weight.changed_bits is not None]
    changed, total = (sum(column) for column in zip(*compared, strict=True)) if compared else (0, 0)
    lost = [weight.delta2 for weight in prune.weights if weight.delta2 is not None]
    cells = (
        format_share(kept / numel if numel else None),
        format_share(changed / total if total else None),
        format_number(sum(lost) / len(lost) if lost else None, 3),
        format_share(prune.explored),
    )
    first = (tag("td", format_integer(prune.step), class_="num"), tag("td", ", ".join(prune.groups)))
    return tag("tr", *first, *(tag("td", cell, class_="num") for cell in cells))


def _table(*parts: Markup) -> Markup:
    return tag("div", tag("table", *parts), class_="scroll", tabindex=0)


def _head(*columns: tuple[str, str]) -> Markup:
    return tag("thead", tag("tr", *(tag("th", name, class_=kind or None, scope="col") for name, kind in columns)))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " \u00d7 ".join(map(str, shape)) or "scalar"


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, "g") if isinstance(value, float) and number(value) is not None else str(value)


def _definitions(pairs: Iterable[tuple[str, str]]) -> Markup:
    rows = [tag("div", tag("dt", name.replace("_", " ")), tag("dd", value)) for name, value in pairs]
    return tag("dl", *rows) if rows else tag("p", "not recorded", class_="quiet")
