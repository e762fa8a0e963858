"""The frame of a chart: axes, grid, and bands with names, drawn in percent so that it fits any width without scripts.

Widths are percentages and heights are pixels, so text keeps its size on a phone. Labels come in three sets, each for
a width of the plot; the style sheet shows the one that fits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gapfx.report.markup import Markup, join, percent, tag
from gapfx.report.scale import Points, Scale, log_labels, tick_labels, ticks

TIER_HEIGHT = 20  # pixels of one row of names above the plot
FOOT_HEIGHT = 38  # pixels for the ticks and the name of the horizontal axis
CHAR_WIDTH = 6.4  # pixels, of the small text
WIDTHS = (("full", 840), ("wide", 500), ("narrow", 250))  # pixels of the plot at least, as in the style sheet
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5.2L5.2 0L0 5.2L-5.2 0z",
    "M0-5L4.8 3.6H-4.8z",
)


@dataclass(frozen=True)
class Band:
    """A stretch of the horizontal axis with a name, a shorter name for less room, and the hue of its group."""

    start: float
    stop: float
    name: str
    short: str = ""
    title: str = ""
    hue: float | None = None


@dataclass(frozen=True)
class Tip:
    """What the chart says at one point; the value places the dot."""

    step: float
    value: float
    text: str


@dataclass(frozen=True)
class Frame:
    """Axes with a name each, bands behind the plot and in the row above it, and wider bands in a row above that."""

    title: str
    description: str
    x: Scale
    y: Scale
    height: int
    x_name: str = "optimizer step"
    bands: tuple[Band, ...] = ()
    outer: tuple[Band, ...] = ()
    share_axis: bool = False
    num_y_ticks: int = 5
    tips: tuple[Tip, ...] = ()

    @property
    def top(self) -> int:
        """Pixels above the plot."""
        return TIER_HEIGHT * (bool(self.bands) + bool(self.outer)) + 6


def draw(frame: Frame, *content: Markup) -> Markup:
    """The frame around `content`, which is drawn with (0, 0) at the top left of the plot."""
    total = frame.top + frame.height + FOOT_HEIGHT
    svg = tag(
        "svg",
        tag("title", frame.title),
        tag("desc", frame.description),
        _tiers(frame),
        tag(
            "g",
            *(_backdrop(band, frame) for band in frame.bands),
            _grid(frame),
            *content,
            transform=f"translate(0 {frame.top})",
        ),
        role="img",
        aria_label=f"{frame.title}. {frame.description}",
        width="100%",
        height=total,
        class_="plot",
    )
    return tag("div", svg, class_="frame", data_tips=_tips(frame), data_top=frame.top, data_height=frame.height)


def curve(points: Points, frame: Frame, kind: str, hue: float | None = None, *, is_step: bool = False) -> Markup:
    """A line through the points, clipped at the plot; `is_step` holds each value until the next."""
    places = [(1000 * frame.x.at(step), frame.height * (1 - frame.y.at(value))) for step, value in points]
    parts = [f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(places)]
    if is_step:
        parts = [f"H{x:.1f}V{y:.1f}" if index else f"M{x:.1f} {y:.1f}" for index, (x, y) in enumerate(places)]
    path = tag("path", d="".join(parts), class_=kind, style=hue_style(hue), vector_effect="non-scaling-stroke")
    box = f"0 0 1000 {frame.height}"
    return tag("svg", path, viewBox=box, preserveAspectRatio="none", width="100%", height=frame.height)


def marker(step: float, value: float, frame: Frame, index: int, hue: float | None, title: str) -> Markup:
    """A small shape of group `index` at a point; shapes differ, so that colour is not alone."""
    shape = tag("path", tag("title", title), d=MARKERS[index % len(MARKERS)], class_="marker", style=hue_style(hue))
    y = frame.height * (1 - frame.y.at(value))
    return tag("svg", shape, x=percent(frame.x.at(step)), y=f"{y:.1f}", class_="spot")


def group_hue(index: int, num_groups: int) -> float:
    """Hue in degrees from teal over blue and violet to rose, in the order of the groups."""
    return (195 + index * min(50.0, 190 / max(num_groups - 1, 1))) % 360


def hue_style(hue: float | None) -> str | None:
    """The inline style that hands a hue to the style sheet."""
    return None if hue is None else f"--h:{hue:.0f}"


def in_every_width(draw_one: Callable[[int], Sequence[Markup]]) -> Markup:
    """What `draw_one(pixels)` draws, once for each width; the style sheet shows one of them."""
    drawn = [(name, join(draw_one(pixels))) for name, pixels in WIDTHS]
    if len({content for _, content in drawn}) == 1:
        return drawn[0][1]
    return join(tag("g", content, class_=name) for name, content in drawn if content)


def fitting(names: Sequence[str], pixels: float) -> str:
    """The first name that fits, or nothing."""
    return next((name for name in names if name and CHAR_WIDTH * len(name) + 6 <= pixels), "")


def steps_axis(frame_x: Scale, pixels: int, y: int) -> list[Markup]:
    """Tick labels of a horizontal axis, as many as `pixels` have room for."""
    values = ticks(frame_x, min(10, pixels // 62))
    whole = [value for value in values if value == math.floor(value)]
    return [
        tag("text", label, x=percent(frame_x.at(value)), y=y, class_="tick middle")
        for value, label in zip(whole, tick_labels(whole), strict=True)
    ]


def _tiers(frame: Frame) -> Markup:
    inner_top = TIER_HEIGHT if frame.outer else 0
    return join(
        (
            *(_chip(band, frame, 0, "round") for band in frame.outer),
            *(_chip(b, frame, inner_top, "chip") for b in frame.bands),
        )
    )


def _chip(band: Band, frame: Frame, top: int, kind: str) -> Markup:
    start, width = _extent(band, frame)
    shape = tag(
        "rect", x=percent(start), y=top, width=percent(width), height=TIER_HEIGHT - 3, rx=3, class_="chip-shape"
    )

    def label(pixels: int) -> list[Markup]:
        name = fitting((band.name, band.short), width * pixels)
        return (
            [tag("text", name, x=percent(start + width / 2), y=top + 12.5, class_="chip-name middle")] if name else []
        )

    kind += "" if band.hue is not None else " plain"
    return tag(
        "g", tag("title", band.title or band.name), shape, in_every_width(label), class_=kind, style=hue_style(band.hue)
    )


def _backdrop(band: Band, frame: Frame) -> Markup:
    start, width = _extent(band, frame)
    kind = "band" if band.hue is not None else "band plain"
    shape = tag(
        "rect", x=percent(start), y=0, width=percent(width), height=frame.height, class_=kind, style=hue_style(band.hue)
    )
    edge = tag("line", x1=percent(start), x2=percent(start), y1=0, y2=frame.height, class_="edge")
    return join((shape, edge)) if start > 0 else shape


def _extent(band: Band, frame: Frame) -> tuple[float, float]:
    start = frame.x.at(band.start)
    return start, frame.x.at(band.stop) - start


def _grid(frame: Frame) -> Markup:
    values = ticks(frame.y, frame.num_y_ticks)
    labels = log_labels(values) if frame.y.is_log else tick_labels(values)
    if frame.share_axis:
        labels = tuple(f"{label} %" for label in tick_labels([round(100 * value, 9) for value in values]))
    rows: list[Markup] = []
    for value, label in zip(values, labels, strict=True):
        y = frame.height * (1 - frame.y.at(value))
        rows.append(tag("line", x1="0%", x2="100%", y1=round(y, 1), y2=round(y, 1), class_="grid"))
        rows.append(tag("text", label, x=-8, y=round(y + 4, 1), class_="tick end"))
    rows.append(tag("line", x1="0%", x2="100%", y1=frame.height, y2=frame.height, class_="axis"))
    rows.append(in_every_width(lambda pixels: steps_axis(frame.x, pixels, frame.height + 17)))
    rows.append(tag("text", frame.x_name, x="100%", y=frame.height + 33, class_="axis-name end"))
    return join(rows)


def _tips(frame: Frame) -> str | None:
    if not frame.tips:
        return None
    places = [[round(frame.x.at(tip.step), 4), round(1 - frame.y.at(tip.value), 4), tip.text] for tip in frame.tips]
    return json.dumps(places, ensure_ascii=False, separators=(",", ":"))
