"""Draws a finished run as one SVG file that stands alone, from the charts of its report.

python tools/make_picture.py runs/fashion-gap --out docs/run.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.report.curves import metric_chart
from gapfx.report.facts import headline, metric_names
from gapfx.report.markup import Markup, tag
from gapfx.report.read_run import Run, read_run
from gapfx.report.timeline import timeline

app = typer.Typer(add_completion=False, help=__doc__)
WIDTH, MARGIN, GAP = 960, 52, 34
# Of the three widths of a label the style sheet shows one by the page around it, which a file alone has not.
STYLE = """
svg { overflow: visible; font: 11.5px ui-sans-serif, system-ui, sans-serif; }
.narrow, .wide { display: none; } .full { display: inline; }
.paper { fill: var(--paper); } .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.number { fill: var(--ink); font-size: 26px; font-weight: 620; } .words { fill: var(--soft); font-size: 13px; }
"""


def picture(run: Run) -> str:
    """The headline, the leading metric over the phases, and which group is dense when."""
    charts = [("Which group is dense when", timeline(run))]
    charts = [(name, metric_chart(run, name)) for name in metric_names(run)[:1]] + charts
    parts, y = list(_facts(run)), 96
    for title, chart in charts:
        if chart is None:
            continue
        plot = _plot(chart)
        parts.append(tag("text", title[:1].upper() + title[1:], x=MARGIN, y=y + 14, class_="title"))
        parts.append(tag("svg", plot, x=MARGIN, y=y + 30, width=WIDTH - 2 * MARGIN, height=_height(plot)))
        y += 30 + _height(plot) + GAP
    style = Markup(files("gapfx.report").joinpath("style.css").read_text(encoding="utf-8") + STYLE)
    paper = tag("rect", width=WIDTH, height=y, rx=12, class_="paper")
    box = {"viewBox": f"0 0 {WIDTH} {y}", "width": WIDTH, "height": y}
    return tag("svg", tag("style", style), paper, *parts, xmlns="http://www.w3.org/2000/svg", role="img", **box) + "\n"


def _facts(run: Run) -> Iterator[Markup]:
    for place, fact in enumerate(headline(run)):
        x = MARGIN + place * (WIDTH - MARGIN) / 3
        yield tag("text", fact.label, x=x, y=34, class_="words")
        yield tag("text", fact.value, x=x, y=62, class_="number")
        yield tag("text", fact.detail.partition(";")[0], x=x, y=82, class_="words")


def _plot(chart: Markup) -> Markup:
    """The drawing of a chart, without its words in HTML and what scripts need."""
    found = re.search(r"<svg[^>]*class=\"plot\".*</svg>", chart, re.S)
    if not found:
        raise ValueError("the chart has no drawing")
    return Markup(found[0])


def _height(plot: Markup) -> int:
    found = re.search(r"<svg[^>]*? height=\"(\d+)\"", plot)
    if not found:
        raise ValueError("the drawing has no height")
    return int(found[1])


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="directory of a finished run")],
    out: Annotated[Path, typer.Option(help="SVG file to write")],
) -> None:
    """Draw a run."""
    out.write_text(picture(read_run(run)), encoding="utf-8")


if __name__ == "__main__":
    app()
