"""The page of a comparison: the metric against sparsity, operations and bytes, and the tables, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gapfx.compare.outcomes import Row
from gapfx.compare.story import story
from gapfx.compare.study import CONTROL, Budget, Study
from gapfx.compare.table import Lines, Tables
from gapfx.quantities import format_number
from gapfx.report.curves import figure
from gapfx.report.frame import MARKERS, Frame, curve, group_hue, hue_style, marker
from gapfx.report.markup import Markup, join, tag
from gapfx.report.scale import padded

Place = Callable[[Row], float]
_LEAST = 20  # of the largest value in its unit: ticks are whole numbers


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: what it shows, and its place of a row; units have the factor `base` between them."""

    title: str
    place: Place
    base: float
    units: tuple[str, ...]


AXES = (
    Axis("sparsity", lambda row: 100 * row.sparsity, 1, ("% of planned weights are zeros",)),
    Axis(
        "operations of the training, counted for the sparse form",
        lambda row: row.flops,
        1000,
        ("operations", "thousand operations", "million operations", "billion operations", "trillion operations"),
    ),
    Axis(
        "bytes of the live weights",
        lambda row: row.live_bytes,
        1024,
        ("bytes of fp32 values and masks", "KiB of fp32 values and masks", "MiB of fp32 values and masks"),
    ),
)


def write_page(path: Path, tables: Tables) -> Path:
    """Write the page and return its path."""
    study = tables.study
    sections = [_section(tables, budget) for budget in tables.budgets()]
    head = (
        Markup('<meta charset="utf-8">'),
        tag("title", f"{Path(study.task).stem}: methods compared"),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("style", Markup(files("gapfx.report").joinpath("style.css").read_text(encoding="utf-8"))),
    )
    title = tag(
        "header",
        tag("p", "gapfx compare", class_="over"),
        tag("h1", Path(study.task).stem),
        tag("p", story(tables), class_="story"),
    )
    body = tag("body", tag("main", title, *sections))
    path.write_text(f"<!doctype html>\n{tag('html', tag('head', *head), body, lang='en')}\n", encoding="utf-8")
    return path


def _section(tables: Tables, budget: Budget) -> Markup:
    (title, lines), *more = tables.of_budget(budget)
    own = [row for row in tables.rows if row.budget == budget]
    charts = [_chart(tables.study, own, axis) for axis in AXES]
    rest = [part for name, found in more for part in (tag("h3", name), _table(found))]
    return tag("section", tag("h2", title), *charts, _table(lines), *rest, id=budget)


def _chart(study: Study, rows: Sequence[Row], axis: Axis) -> Markup:
    place, unit = _in_unit(axis, rows)
    names = [contender.name for contender in study.contenders]
    x, y = padded([place(row) for row in rows]), padded([row.value.mean for row in rows])
    frame = Frame(
        f"{study.metric} against {axis.title}", "a point a method and sparsity, mean over seeds", x, y, 260, unit
    )
    parts: list[Markup] = []
    for index, name in enumerate(names):
        own = sorted((row for row in rows if row.name == name), key=place)
        hue = group_hue(index, len(names))
        if len(own) > 1:
            parts.append(curve(tuple((place(row), row.value.mean) for row in own), frame, "line thin", hue))
        parts += [marker(place(row), row.value.mean, frame, index, hue, _words(row)) for row in own]
    return figure(frame, study.metric, *parts, legend=_legend(names))


def _in_unit(axis: Axis, rows: Sequence[Row]) -> tuple[Place, str]:
    """The places in the largest unit that leaves room for whole ticks, and its name."""
    largest = max(axis.place(row) for row in rows)
    power = max((p for p in range(len(axis.units)) if largest >= _LEAST * axis.base**p), default=0)
    return lambda row: axis.place(row) / axis.base**power, axis.units[power]


def _words(row: Row) -> str:
    at = "" if row.name == CONTROL else f" at {row.sparsity:.0%}"
    return f"{row.name}{at}: {format_number(row.value.mean)}"


def _legend(names: Sequence[str]) -> Markup:
    entries: list[Markup] = []
    for index, name in enumerate(names):
        shape = tag("path", d=MARKERS[index % len(MARKERS)], class_="marker")
        mark = tag("svg", shape, viewBox="-6 -6 12 12", style=hue_style(group_hue(index, len(names))))
        entries.append(tag("li", mark, name))
    return tag("ul", join(entries), class_="legend")


def _table(lines: Lines) -> Markup:
    head, *rest = (
        tag("tr", *(tag("td" if index else "th", cell) for cell in line)) for index, line in enumerate(lines)
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rest)), class_="scroll")
