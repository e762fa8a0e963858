"""Sparsity of every weight against its target: rows with names for a few weights, columns for hundreds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gapfx.quantities import format_share
from gapfx.report.curves import figure
from gapfx.report.facts import WeightState
from gapfx.report.frame import Band, Frame, group_hue, hue_style
from gapfx.report.markup import Markup, breakable, percent, tag
from gapfx.report.scale import Scale

MAX_ROWS = 32
NO_TARGET = "each prune shares out a group's total between its weights"
TITLE = "Sparsity of each weight"


def sparsity_chart(states: Sequence[WeightState], group_names: tuple[str, ...]) -> Markup | None:
    """Bars for the actual sparsity, ticks for the target; None when there are no weights."""
    if not states:
        return None
    return _rows(states, group_names) if len(states) <= MAX_ROWS else _columns(states, group_names)


def largest_miss(states: Sequence[WeightState]) -> str:
    """In words, how far the actual sparsity is from the target at worst."""
    misses = [
        (abs(state.sparsity - state.target), state.fqn)
        for state in states
        if state.sparsity is not None and state.target is not None and not state.is_grown
    ]
    if not misses:
        if any(state.sparsity is None for state in states):
            return "not counted yet"
        return "" if any(state.is_grown for state in states) else NO_TARGET
    miss, fqn = max(misses)
    if miss < 0.0005:
        return "every weight is within 0.05 points of its target"
    return f"largest distance from target: {100 * miss:.2f} points, {fqn}"


def _hue(state: WeightState, group_names: tuple[str, ...]) -> float:
    index = group_names.index(state.group) if state.group in group_names else 0
    return group_hue(index, len(group_names))


def _rows(states: Sequence[WeightState], group_names: tuple[str, ...]) -> Markup:
    caption = tag("figcaption", tag("h3", TITLE), tag("p", f"bar: actual, tick: target; {largest_miss(states)}"))
    rows: list[Markup] = []
    for group, members in itertools.groupby(states, key=lambda state: state.group):
        rows.append(tag("h4", group, class_="bar-group", style=hue_style(_hue_of(group, group_names))))
        rows += [_row(state, _hue(state, group_names)) for state in members]
    axis = tag(
        "div", *(tag("span", f"{value} %") for value in (0, 25, 50, 75, 100)), class_="bar-axis", aria_hidden="true"
    )
    return tag("figure", caption, tag("div", *rows, axis, class_="bars"))


def _hue_of(group: str, group_names: tuple[str, ...]) -> float:
    return group_hue(group_names.index(group) if group in group_names else 0, len(group_names))


def _row(state: WeightState, hue: float) -> Markup:
    parts = [tag("rect", x=0, y=4, width="100%", height=8, rx=2, class_="track")]
    if state.sparsity is not None:
        parts.append(tag("rect", x=0, y=4, width=percent(state.sparsity), height=8, rx=2, class_="fill"))
    if state.target is not None:
        place = percent(state.target)
        parts.append(tag("line", x1=place, x2=place, y1=0, y2=16, class_="target"))
    bar = tag("svg", *parts, width="100%", height=16, aria_hidden="true", style=hue_style(hue))
    target = "dense now" if state.is_grown else "" if state.target is None else f"target {format_share(state.target)}"
    value = tag("span", format_share(state.sparsity), tag("small", target), class_="value")
    return tag("div", tag("span", breakable(state.fqn), class_="fqn"), bar, value, class_="bar-row")


def _target_words(state: WeightState) -> str:
    return "" if state.target is None else f", target {format_share(state.target)}"


def _columns(states: Sequence[WeightState], group_names: tuple[str, ...]) -> Markup:
    bands: list[Band] = []
    start = 0
    for group, members in itertools.groupby(states, key=lambda state: state.group):
        stop = start + len(list(members))
        index = group_names.index(group) if group in group_names else 0
        hue = group_hue(index, len(group_names))
        bands.append(Band(start, stop, group, str(index + 1), f"{group}: {stop - start} weights", hue))
        start = stop
    frame = Frame(
        TITLE,
        f"column: actual, line across it: target; {largest_miss(states)}",
        Scale(0.0, float(len(states))),
        Scale(0.0, 1.0),
        200,
        x_name="weight, in the order of the plan",
        bands=tuple(bands),
        share_axis=True,
    )
    columns = [_column(state, index, frame, _hue(state, group_names)) for index, state in enumerate(states)]
    return figure(frame, "share of zeros", *columns)


def _column(state: WeightState, index: int, frame: Frame, hue: float) -> Markup:
    start, width = frame.x.at(index), frame.x.at(1)
    words = f"{state.fqn}: {format_share(state.sparsity)}{_target_words(state)}"
    parts = [tag("title", words)]
    if state.sparsity is not None:
        height = frame.height * state.sparsity
        place = {"x": percent(start + 0.08 * width), "width": percent(0.84 * width)}
        parts.append(tag("rect", **place, y=f"{frame.height - height:.1f}", height=f"{height:.1f}", class_="fill"))
    if state.target is not None:
        y = f"{frame.height * (1 - state.target):.1f}"
        parts.append(tag("line", x1=percent(start), x2=percent(start + width), y1=y, y2=y, class_="target"))
    return tag("g", *parts, style=hue_style(hue))
