"""A figure as one SVG file that needs nothing else: no script, no font, light and dark."""

from __future__ import annotations

from collections.abc import Sequence

from gapfx.compiler import Unit
from gapfx.figure.drawing import chip_width, draw_columns, label_width
from gapfx.figure.legend import draw_legend, least_width
from gapfx.figure.lines import best_columns
from gapfx.figure.page import find_ports
from gapfx.figure.palette import group_class, style
from gapfx.figure.routes import route
from gapfx.figure.scene import Model, Scene
from gapfx.plan import Plan
from gapfx.report.markup import Markup, tag

MARKER = '<?xml version="1.0" encoding="UTF-8"?>\n<!-- figure of gapfx -->\n'
MARGIN = 24


def draw(scene: Scene) -> str:
    """The file's text; the same scene gives the same text in every run."""
    sizes, columns = best_columns(scene.boxes, chip_width(scene), label_width(scene))
    routed = route(scene.model.graph, find_ports(columns, sizes), columns)
    content = max(routed.shape.width, least_width(scene))
    legend = draw_legend(scene, content)
    top = MARGIN + legend.height + routed.top
    width, height = round(content + 2 * MARGIN), round(top + routed.rows.bottom + MARGIN)
    looks = [*(group_class(index) for index in range(len(scene.plan.groups))), "d"]
    parts = (
        tag("title", f"{scene.model.title} · gapfx"),
        tag("style", Markup(style(list(dict.fromkeys(looks))))),
        tag("rect", width=width, height=height, class_="ground"),
        tag("g", legend.markup, transform=f"translate({MARGIN} {MARGIN})"),
        tag("g", draw_columns(scene, columns, sizes, routed), transform=f"translate({MARGIN} {top:g})"),
    )
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    return f"{MARKER}{tag('svg', *parts, xmlns='http://www.w3.org/2000/svg', role='img', **size)}\n"


class Sketch:
    """Takes what a figure needs from a compilation before a rewrite changes the model."""

    def __init__(self) -> None:
        self._model: Model | None = None

    def begin(self, unit: Unit) -> None:
        """Look at the model as it was captured."""
        self._model = Model.of(unit)

    def after(self, name: str, unit: Unit) -> None:
        """Passes change nothing that is drawn."""

    def svg(self, plan: Plan, notes: Sequence[str] = ()) -> str:
        """The figure with the groups of a plan, and lines of text below its title."""
        assert self._model is not None
        return draw(Scene(self._model, plan, tuple(notes)))
