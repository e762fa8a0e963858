"""The report as one HTML file that needs nothing else: no network, no fonts, style and charts inline."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from gapfx.report.bars import sparsity_chart
from gapfx.report.curves import changed_chart, explored_chart, loss_chart, lr_chart, metric_chart
from gapfx.report.facts import Fact, WeightState, headline, metric_names, state_line, story, weight_states
from gapfx.report.markup import Markup, glued, join, tag
from gapfx.report.read_run import Run, number, read_run
from gapfx.report.tables import (
    dense_table,
    plan_list,
    prunes_table,
    resources_list,
    settings_list,
    versions_list,
    weights_table,
)
from gapfx.report.timeline import timeline

MAX_METRICS = 6


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run directory and return its path. Raises UserError when it holds no run."""
    path = run_dir / "report.html"
    path.write_text(page(read_run(run_dir)), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The whole document."""
    states = weight_states(run)
    body = (
        _header(run),
        _section("Training", "training", *_training(run)),
        _section("Groups", "groups", timeline(run)),
        _section("Masks", "masks", *_masks(run)),
        _section("Sparsity", "sparsity", sparsity_chart(states, run.group_names)),
        _section("Weights", "weights", *_weights(run, states)),
        _section("How it was made", "made", _made(run)),
        tag("footer", "Written by gapfx. Sparsity is the share of zeros; a live weight is one that its mask keeps."),
    )
    head = (
        tag("title", f"{_name(run)} \u00b7 gapfx"),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("style", Markup(_resource("style.css"))),
    )
    script = tag("script", Markup(_resource("tooltip.js")))
    document = tag(
        "html", tag("head", Markup('<meta charset="utf-8">'), *head), tag("body", tag("main", *body), script), lang="en"
    )
    return f"<!doctype html>\n{document}\n"


def _resource(name: str) -> str:
    return files("gapfx.report").joinpath(name).read_text(encoding="utf-8")


def _name(run: Run) -> str:
    return run.path.resolve().name or "run"


def _header(run: Run) -> Markup:
    started = number(run.start.get("time"))
    when = "" if started is None else datetime.fromtimestamp(started, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    return tag(
        "header",
        tag("p", "gapfx run", tag("span", when), class_="over"),
        tag("h1", _name(run)),
        tag("p", glued(story(run)), class_="story"),
        _banner(run),
        tag("div", *(_fact(fact) for fact in headline(run)), class_="facts"),
    )


def _banner(run: Run) -> Markup:
    lines: list[Markup] = []
    if not run.is_finished:
        resume = join(("Continue it with the same command and ", tag("code", "--resume"), "."))
        lines.append(tag("p", tag("strong", "This run is not finished"), f": {state_line(run)}. ", resume))
    lines += [tag("p", f"{note[:1].upper()}{note[1:]}.") for note in run.notes]
    return tag("div", *lines, class_="banner", role="status") if lines else Markup()


def _fact(fact: Fact) -> Markup:
    number_part, _, unit = fact.value.partition(" ")
    value = tag("p", number_part, tag("span", f" {unit}") if unit else "", class_="value")
    return tag("div", tag("h2", fact.label), value, tag("p", glued(fact.detail), class_="detail"), class_="fact")


def _section(title: str, anchor: str, *parts: Markup | None) -> Markup:
    """The section, or nothing when none of its parts exist."""
    present = [part for part in parts if part]
    return tag("section", tag("h2", title), *present, id=anchor) if present else Markup()


def _training(run: Run) -> list[Markup | None]:
    metrics = [chart for name in metric_names(run)[:MAX_METRICS] if (chart := metric_chart(run, name)) is not None]
    parts: list[Markup | None] = [loss_chart(run), *metrics[:1]]
    if len(metrics) > 1:
        parts.append(_pair(*metrics[1:]))
    parts.append(lr_chart(run))
    if not any(parts):
        return [tag("p", "Nothing has been logged yet.", class_="quiet")]
    return parts


def _masks(run: Run) -> list[Markup | None]:
    if not run.prunes:
        is_planned = any(span.prune for span in run.spans)
        words = (
            "No prune has happened yet." if is_planned else "This method never prunes: the masks stay as they began."
        )
        return [tag("p", words, class_="quiet")]
    charts = [chart for chart in (changed_chart(run), explored_chart(run)) if chart is not None]
    return [
        _pair(*charts),
        _details(f"All {len(run.prunes)} prunes" if len(run.prunes) > 1 else "The prune", prunes_table(run)),
    ]


def _weights(run: Run, states: tuple[WeightState, ...]) -> list[Markup | None]:
    dense = run.plan.dense if run.plan is not None else ()
    words = f"{len(dense)} more weight{'s' if len(dense) != 1 else ''} stayed dense"
    return [weights_table(states, run.group_names), _details(words, dense_table(run))]


def _made(run: Run) -> Markup:
    cards = (
        ("Resources", resources_list(run)),
        ("Plan", plan_list(run)),
        ("Settings", settings_list(run)),
        ("Versions", versions_list(run)),
    )
    return tag(
        "div",
        *(tag("div", tag("h3", name), content, class_="card") for name, content in cards if content),
        class_="cards",
    )


def _pair(*charts: Markup) -> Markup:
    return tag("div", *charts, class_="pair")


def _details(words: str, content: Markup | None) -> Markup | None:
    return None if content is None else tag("details", tag("summary", words), content)
