"""Which group is dense when, when it is pruned, and how many planned weights live meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gapfx.plan import Group
from gapfx.quantities import format_count, format_share
from gapfx.report.frame import fitting, group_hue, hue_style, in_every_width, steps_axis
from gapfx.report.markup import Markup, glued, join, percent, tag
from gapfx.report.read_run import Run, Span
from gapfx.report.scale import Scale

MAX_TALL_ROWS = 16  # more groups get low rows without a line of text each
LIVE_HEIGHT = 36


@dataclass(frozen=True)
class Rows:
    """Heights in pixels: of a row, of the bar at its bottom, and of the text above the bar."""

    row: int
    bar: int
    text: int


TALL, LOW = Rows(38, 14, 16), Rows(15, 11, 0)


def timeline(run: Run) -> Markup | None:
    """One row a group and the live share below, on the axis of the steps."""
    names, rows = run.group_names, TALL if len(run.group_names) <= MAX_TALL_ROWS else LOW
    if not names or not run.spans:
        return None
    x = Scale(0.0, float(max(run.num_steps, run.last_step, 1)))
    parts = [tag("title", "Group timeline"), tag("desc", _words(run))]
    parts += [
        tag("g", _row(run, name, index, x, rows), transform=f"translate(0 {index * rows.row})")
        for index, name in enumerate(names)
    ]
    bottom = len(names) * rows.row + 6
    live = _live_row(run, x)
    if live is not None:
        parts.append(tag("g", live, transform=f"translate(0 {bottom})"))
        bottom += LIVE_HEIGHT + 24
    parts.append(tag("line", x1="0%", x2="100%", y1=bottom, y2=bottom, class_="axis"))
    parts.append(in_every_width(lambda pixels: steps_axis(x, pixels, bottom + 17)))
    parts.append(tag("text", "optimizer step", x="100%", y=bottom + 33, class_="axis-name end"))
    if not run.is_finished and run.last_step:
        parts.append(_now(run, x, bottom))
    svg = tag(
        "svg",
        *parts,
        role="img",
        aria_label=f"Group timeline. {_words(run)}",
        width="100%",
        height=bottom + 40,
        class_="plot",
    )
    caption = tag("figcaption", tag("h3", "Which group is dense when"), tag("p", glued(_words(run))))
    return tag("figure", caption, _legend(run), tag("div", svg, class_="frame flush"))


def dense_spans(run: Run, name: str) -> list[tuple[int, int]]:
    """Stretches of steps in which the group is dense, neighbours joined unless a prune lies between them."""
    joined: list[tuple[int, int]] = []
    for span in run.spans:
        if name not in span.grow:
            continue
        before = next((s for s in run.spans if s.stop == span.start), None)
        is_joined = joined and joined[-1][1] == span.start and before is not None and name not in before.prune
        joined.append((joined.pop()[0], span.stop) if is_joined else (span.start, span.stop))
    return joined


def live_share(run: Run, span: Span) -> float | None:
    """Share of planned weights that live in the phase, by the plan: grown groups whole, others at their target.

    Of replicas, that which has most.
    """
    if run.plan is None:
        return None
    groups = run.plan.eased(run.spans.index(span) - 1).groups
    total = sum(group.numel for group in groups)
    return max(_num_live(groups, dense) for dense in span.dense_at_once()) / total if total else None


def _num_live(groups: Sequence[Group], dense: Collection[str]) -> float:
    return sum(
        weight.numel * (1.0 if group.name in dense else 1 - weight.sparsity)
        for group in groups
        for weight in group.weights
    )


def _row(run: Run, name: str, index: int, x: Scale, rows: Rows) -> Markup:
    hue = group_hue(index, len(run.group_names))
    middle = rows.text + rows.bar / 2
    parts = [tag("line", x1="0%", x2="100%", y1=middle, y2=middle, class_="sparse", style=hue_style(hue))]
    for start, stop in dense_spans(run, name):
        title = f"{name} dense: steps {start:,} to {stop:,}"
        for low, high, kind in _past_and_future(start, stop, run):
            extent = {"x": percent(x.at(low)), "width": percent(x.at(high) - x.at(low))}
            bar = tag("rect", tag("title", title), **extent, y=rows.text, height=rows.bar, rx=3, class_=kind)
            parts.append(tag("g", bar, style=hue_style(hue)))
    for span in run.spans:
        if name in span.prune:
            is_future = not run.is_finished and span.stop > run.last_step
            parts.append(_prune_mark(name, span.stop, x, rows, "cut future" if is_future else "cut"))
    if rows.text:
        parts.append(
            tag("text", name, tag("tspan", _group_detail(run, name), class_="quiet"), x=0, y=11, class_="row-name")
        )
    else:
        parts.append(tag("text", str(index + 1), x=-8, y=middle + 4, class_="tick end"))
    return join(parts)


def _past_and_future(start: int, stop: int, run: Run) -> list[tuple[int, int, str]]:
    if run.is_finished or stop <= run.last_step:
        return [(start, stop, "dense")]
    if start >= run.last_step:
        return [(start, stop, "dense future")]
    return [(start, run.last_step, "dense"), (run.last_step, stop, "dense future")]


def _prune_mark(name: str, step: int, x: Scale, rows: Rows, kind: str) -> Markup:
    """An upright bar with a foot at the end of the dense stretch."""
    low, high = rows.text - 2, rows.text + rows.bar + 2
    shape = tag("path", tag("title", f"{name} pruned after step {step:,}"), d=f"M0 {low}V{high}", class_=kind)
    return tag("svg", shape, x=percent(x.at(step)), y=0, class_="spot")


def _live_row(run: Run, x: Scale) -> Markup | None:
    shares = [(span, live_share(run, span)) for span in run.spans]
    known = [(span, share) for span, share in shares if share is not None]
    if not known:
        return None
    parts = [
        tag("text", "planned weights live, of all", x=0, y=11, class_="row-name quiet"),
        tag("rect", x=0, y=16, width="100%", height=LIVE_HEIGHT, class_="track"),
    ]
    for span, share in known:
        width, height = x.at(span.stop) - x.at(span.start), share * LIVE_HEIGHT
        top = 16 + LIVE_HEIGHT - height
        title = tag("title", f"{span.name}: {format_share(share)} live")
        kind = "live" if run.is_finished or span.start < run.last_step else "live future"
        parts.append(
            tag(
                "rect",
                title,
                x=percent(x.at(span.start)),
                y=f"{top:.1f}",
                width=percent(width),
                height=f"{height:.1f}",
                class_=kind,
            )
        )
        parts.append(
            in_every_width(lambda pixels, s=span, v=share, w=width, t=top: _live_label(s, v, w * pixels, t, x))
        )
    return join(parts)


def _live_label(span: Span, share: float, pixels: float, top: float, x: Scale) -> list[Markup]:
    text = fitting((format_share(share), f"{100 * share:.0f}"), pixels)
    return (
        [
            tag(
                "text",
                text,
                x=percent(x.at((span.start + span.stop) / 2)),
                y=f"{max(top - 4, 29):.1f}",
                class_="live-name middle",
            )
        ]
        if text
        else []
    )


def _now(run: Run, x: Scale, bottom: int) -> Markup:
    place = percent(x.at(run.last_step))
    return tag("line", tag("title", f"now: step {run.last_step:,}"), x1=place, x2=place, y1=0, y2=bottom, class_="now")


def _legend(run: Run) -> Markup:
    items = [("dense", "dense"), ("sparse", "sparse, mask fixed")]
    items += [("cut", "pruned here")] if any(span.prune for span in run.spans) else []
    items += [("now", "now; paler is still to come")] if not run.is_finished and run.last_step else []
    shapes = {
        "dense": tag("rect", x=0, y=1, width=18, height=10, rx=3, class_="dense"),
        "sparse": tag("line", x1=0, x2=18, y1=6, y2=6, class_="sparse"),
        "cut": tag("path", d="M9 0V12", class_="cut"),
        "now": tag("path", d="M9 0V12", class_="now"),
    }
    entries = [
        tag("li", tag("svg", shapes[kind], width=18, height=12, viewBox="0 0 18 12", aria_hidden="true"), words)
        for kind, words in items
    ]
    return tag("ul", *entries, class_="legend", style=hue_style(195.0))


def _group_detail(run: Run, name: str) -> str:
    group = next((group for group in run.plan.groups if group.name == name), None) if run.plan else None
    if group is None:
        return ""
    count = len(group.weights)
    return f"  {count} weight{'s' if count != 1 else ''}, {format_count(group.numel)}"


def _words(run: Run) -> str:
    num_prunes = sum(bool(span.prune) for span in run.spans)
    most = max((len(dense) for span in run.spans for dense in span.dense_at_once()), default=0)
    if most == 0:
        return "no group is ever dense: the masks are fixed from the first step"
    if num_prunes == 0:
        return "never pruned"
    dense = "all groups are" if most == len(run.group_names) else f"at most {most} of {len(run.group_names)} groups is"
    where = " in each replica" if any(span.replicas > 1 for span in run.spans) else ""
    return f"{num_prunes} prune{'s' if num_prunes != 1 else ''}; {dense} dense at once{where}"
