"""Charts over the steps of a run: loss, learning rate, metrics, mask bits changed, weights explored."""

from __future__ import annotations

import itertools

from gapfx.quantities import format_number, format_share
from gapfx.report.facts import best_of
from gapfx.report.frame import MARKERS, Band, Frame, Tip, curve, draw, group_hue, hue_style, marker
from gapfx.report.markup import Markup, glued, join, tag
from gapfx.report.read_run import Prune, Run, Span
from gapfx.report.scale import Points, Scale, loss_scale, padded, smoothed, thinned

MAX_TIPS = 300
MAX_MARKERS = 30  # of one line: beyond that they hide it


def loss_chart(run: Run) -> Markup | None:
    """Training loss, raw and averaged, with what lies outside of the chart said in words."""
    points = tuple((step.step, step.loss) for step in run.steps if step.loss is not None)
    if not points:
        return None
    scale = loss_scale([value for _, value in points])
    average = smoothed(points, [span.start for span in run.spans]) if len(points) > 60 else ()
    num_above = sum(value > scale.high for _, value in points)
    num_bad = len(run.steps) - len(points)
    words = [
        f"last {format_number(points[-1][1])}, lowest {format_number(min(value for _, value in points))}",
        "faint: every logged step; strong: its moving average" if average else "",
        f"{num_above} of {len(points)} values are above the chart" if num_above else "",
        f"{num_bad} value{'s were' if num_bad > 1 else ' was'} not finite" if num_bad else "",
    ]
    frame = _frame(
        run, "Training loss", "; ".join(word for word in words if word), scale, 240, _tips(run, points, "loss")
    )
    lines = [curve(thinned(points), frame, "raw" if average else "line")]
    lines += [curve(thinned(average), frame, "line")] if average else []
    return figure(frame, "loss, log scale" if scale.is_log else "loss", *lines)


def lr_chart(run: Run) -> Markup | None:
    """Learning rate: shows the restarts."""
    points = tuple((step.step, step.lr) for step in run.steps if step.lr is not None)
    if len({value for _, value in points}) < 2:
        return None
    scale = Scale(0.0, 1.06 * max(value for _, value in points))
    if scale.high <= 0:
        return None
    frame = _frame(run, "Learning rate", "", scale, 80, _tips(run, points, "lr"), num_y_ticks=2)
    return figure(frame, "learning rate", curve(thinned(points), frame, "line quiet"))


def metric_chart(run: Run, name: str) -> Markup | None:
    """One metric at every evaluation, its best value marked."""
    points: Points = tuple((e.step, e.metrics[name]) for e in run.evaluations if name in e.metrics)
    if not points:
        return None
    best = best_of(run, name)
    words = f"last {format_number(points[-1][1])}" + (
        f"; best while sparse {format_number(best[1])}, at step {best[0]:,}, ringed" if best else ""
    )
    scale = padded([value for _, value in points])
    frame = _frame(run, f"{name[:1].upper()}{name[1:]} at evaluation", words, scale, 200, _tips(run, points, name))
    dots = [marker(s, v, frame, 0, None, f"step {s:,}: {format_number(v)}") for s, v in points]
    crown = (
        [tag("g", marker(*best, frame, 0, None, f"best while sparse: {format_number(best[1])}"), class_="best")]
        if best
        else []
    )
    line = curve(thinned(points), frame, "line")
    return figure(frame, name, line, *(dots if len(dots) <= MAX_MARKERS else ()), *crown)


def changed_chart(run: Run) -> Markup | None:
    """Share of mask bits that changed at each prune, one line a group."""
    series = _changed_by_group(run)
    if not series:
        return None
    highest = max(share for points in series.values() for _, share in points)
    words = "share of a group\u2019s mask bits that differ from the mask before it was grown"
    frame = _frame(run, "Mask bits changed at each prune", words, Scale(0.0, max(1.1 * highest, 0.01)), 200, (), True)
    names = run.group_names
    parts: list[Markup] = []
    for name, points in series.items():
        index = names.index(name) if name in names else 0
        hue = group_hue(index, len(names))
        parts.append(curve(points, frame, "line thin", hue))
        if len(points) <= MAX_MARKERS:
            parts += [
                marker(step, share, frame, index, hue, f"{name}, step {step:,}: {format_share(share)} changed")
                for step, share in points
            ]
    return figure(frame, "share of mask bits", *parts, legend=_legend(list(series), names))


def explored_chart(run: Run) -> Markup | None:
    """Share of planned weights that were ever live, at each prune."""
    points = tuple((prune.step, prune.explored) for prune in run.prunes if prune.explored is not None)
    if not points:
        return None
    words = f"planned weights that were live at least once: {format_share(points[-1][1])}"
    tips = tuple(Tip(step, share, f"step {step:,}: {format_share(share)} explored") for step, share in points)
    frame = _frame(run, "Weights ever explored", words, Scale(0.0, 1.04), 200, tips[:MAX_TIPS], True)
    dots = [marker(s, v, frame, 0, None, f"step {s:,}: {format_share(v)}") for s, v in points]
    return figure(
        frame, "share of planned weights", curve(points, frame, "line"), *(dots if len(dots) <= MAX_MARKERS else ())
    )


def figure(frame: Frame, unit: str, *content: Markup, legend: Markup | None = None) -> Markup:
    """A chart with its title, its words and the unit of its vertical axis."""
    caption = tag("figcaption", tag("h3", frame.title), tag("p", glued(frame.description)))
    return tag("figure", caption, legend or Markup(), tag("div", unit, class_="unit"), draw(frame, *content))


def phase_bands(run: Run) -> tuple[Band, ...]:
    """One band a phase, in the hue of the group that it grows."""
    names = run.group_names
    return tuple(_phase_band(span, names) for span in run.spans)


def round_bands(run: Run) -> tuple[Band, ...]:
    """One band a round that has two or more growing phases; none when no round has."""
    growing = [span for span in run.spans if span.grow]
    rounds = [(number, list(spans)) for number, spans in itertools.groupby(growing, key=lambda span: span.round)]
    if all(len(spans) < 2 for _, spans in rounds):
        return ()
    return tuple(
        Band(spans[0].start, spans[-1].stop, f"round {number + 1}", str(number + 1)) for number, spans in rounds
    )


def _phase_band(span: Span, names: tuple[str, ...]) -> Band:
    grown = f", dense: {', '.join(span.grow)}" if span.grow else ""
    title = f"{span.name}: steps {span.start:,} to {span.stop:,}{grown}"
    if len(span.grow) == 1 and len(names) > 1 and span.grow[0] in names:
        index = names.index(span.grow[0])
        return Band(span.start, span.stop, span.grow[0], str(index + 1), title, group_hue(index, len(names)))
    return Band(span.start, span.stop, span.name, "", title, 195.0 if span.grow else None)


def _frame(
    run: Run,
    title: str,
    words: str,
    y: Scale,
    height: int,
    tips: tuple[Tip, ...],
    shares: bool = False,
    num_y_ticks: int = 5,
) -> Frame:
    x = Scale(0.0, float(max(run.num_steps, run.last_step, 1)))
    return Frame(
        title,
        words,
        x,
        y,
        height,
        bands=phase_bands(run),
        outer=round_bands(run),
        share_axis=shares,
        num_y_ticks=num_y_ticks,
        tips=tips,
    )


def _tips(run: Run, points: Points, name: str) -> tuple[Tip, ...]:
    every = -(-len(points) // MAX_TIPS)
    return tuple(
        Tip(step, value, f"step {step:,}: {name} {format_number(value)}{_during(run, step)}")
        for step, value in points[::every]
    )


def _during(run: Run, step: float) -> str:
    """The phase that trained the last of `step` steps."""
    span = next((span for span in run.spans if span.start < step <= span.stop), None)
    return f" ({span.name})" if span else ""


def _changed_by_group(run: Run) -> dict[str, Points]:
    plan_groups = {weight.fqn: group.name for group in run.plan.groups for weight in group.weights} if run.plan else {}
    series: dict[str, Points] = {}
    for prune in run.prunes:
        for name, share in _changed_shares(prune, plan_groups).items():
            series[name] = (*series.get(name, ()), (prune.step, share))
    return {name: series[name] for name in sorted(series, key=lambda n: _order(n, run.group_names))}


def _changed_shares(prune: Prune, group_of: dict[str, str]) -> dict[str, float]:
    """Group -> changed mask bits over all its mask bits, at one prune."""
    totals: dict[str, tuple[int, int]] = {}
    for weight in prune.weights:
        name = group_of.get(weight.fqn) or (prune.groups[0] if prune.groups else "")
        if weight.changed_bits is not None and weight.numel:
            changed, numel = totals.get(name, (0, 0))
            totals[name] = (changed + weight.changed_bits, numel + weight.numel)
    return {name: changed / numel for name, (changed, numel) in totals.items()}


def _order(name: str, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else len(names)


def _legend(shown: list[str], names: tuple[str, ...]) -> Markup:
    entries = [tag("li", legend_mark(_order(name, names), len(names)), name) for name in shown]
    return tag("ul", join(entries), class_="legend")


def legend_mark(index: int, num_groups: int) -> Markup:
    """The shape and colour of a group, for text."""
    shape = tag("path", d=MARKERS[index % len(MARKERS)], class_="marker", style=hue_style(group_hue(index, num_groups)))
    return tag("svg", shape, viewBox="-6 -6 12 12", width=12, height=12, aria_hidden="true")
