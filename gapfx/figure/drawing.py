"""The boxes, weights, joins and edges of a figure as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gapfx.figure.boxes import Item
from gapfx.figure.graph import LOOP, Site
from gapfx.figure.labels import (
    LABEL_SIZE,
    NAME_SIZE,
    SHAPE_SIZE,
    clip,
    label_lines,
    shape_text,
    weight_name,
    width_of,
)
from gapfx.figure.lines import CHIP_HEIGHT, JOIN_SIZE, PAD, Line, Placed, Sizes
from gapfx.figure.palette import group_class, is_striped
from gapfx.figure.routes import Point, Routed
from gapfx.figure.scene import Scene
from gapfx.quantities import format_share
from gapfx.report.markup import Markup, join, tag

STRIPE = 18.0
CHIP_PADDING = 6.0
MIN_CHIP, MAX_CHIP = 92.0, 200.0
MAX_LABEL, MAX_LINES = 17, 3  # places, and lines beside one weight
LINE_PITCH = 12
RADIUS = 4.0
SIGNS = {"add": "M-4 0H4M0-4V4", "mul": "M-3-3L3 3M-3 3L3-3", "cat": "M-2-4V4M2-4V4", LOOP: "M-4.5 0h2M-1 0h2M2.5 0h2"}
WORDS = {"add": "sum", "mul": "product", "cat": "concatenation", LOOP: "many joins"}


def chip_width(scene: Scene) -> float:
    """Pixels that the widest weight needs, within bounds."""
    widest = 0.0
    for box in scene.boxes:
        for item in (item for cell in box.cells for item in cell.items if item.fqn):
            site = scene.site(item)
            texts = drawn_name(site, item.fqn, box.name), drawn_shape(scene, site, item.fqn)
            widest = max(widest, width_of(texts[0], NAME_SIZE), width_of(texts[1], SHAPE_SIZE))
    return round(min(max(widest + STRIPE + 2 * CHIP_PADDING, MIN_CHIP), MAX_CHIP))


def label_width(scene: Scene) -> float:
    """Pixels that the names of the boxes need."""
    lines = [line for box in scene.boxes for line in label_lines(box.name, MAX_LABEL, len(box.name))]
    return round(max((width_of(line, LABEL_SIZE) for line in lines), default=0.0))


def join_kind(fn: str) -> str:
    """`add`, `mul`, `cat` or `loop` of the function of a join."""
    return next((kind for kind in SIGNS if kind in fn), "cat")


def draw_columns(scene: Scene, columns: Sequence[Sequence[Line]], sizes: Sizes, routed: Routed) -> Markup:
    """Boxes first, edges above them, weights and joins on top."""
    boxes, items = list[Markup](), list[Markup]()
    for column, lines in enumerate(columns):
        left, tops = routed.shape.lefts[column], routed.rows.tops[column]
        boxes += _boxes(scene, lines, tops, left, routed.shape.widths[column], sizes)
        for line, top in zip(lines, tops, strict=True):
            name = scene.boxes[line.box].name
            for placed in line.cells:
                boxes += [_grid_frame(placed, left, top)] * placed.cell.is_grid
                items += _items(scene, name, placed, sizes, (left, top))
    return join((*boxes, *_edges(scene, routed), *items))


def drawn_name(site: Site, fqn: str, box: str) -> str:
    """First line on a weight; a tied one has the name of the module that uses it again."""
    return weight_name(f"{site.scope}.weight" if site.kind == "again" and site.scope else fqn, box)


def drawn_shape(scene: Scene, site: Site, fqn: str) -> str:
    """Second line on a weight; a tied one says whose weight it is."""
    if site.kind == "again" and site.scope:
        return f"= {weight_name(fqn, '')}"
    return shape_text(scene.shape(fqn), site.fn, site.num_uses)


def _boxes(
    scene: Scene, lines: Sequence[Line], tops: Sequence[float], left: float, width: float, sizes: Sizes
) -> Iterator[Markup]:
    """A frame, the name, and at the left the colour of the group when all its weights are in one."""
    for row, (line, top) in enumerate(zip(lines, tops, strict=True)):
        if not line.is_first:
            continue
        end = next(at for at in range(row, len(lines)) if lines[at].is_last)
        start, stop = top - PAD, tops[end] + lines[end].height + PAD
        box = scene.boxes[line.box]
        size = {"x": _px(left), "y": _px(start), "width": _px(width), "height": _px(stop - start)}
        parts = [tag("title", box.name or scene.model.title), tag("rect", **size, rx=6, class_="box")]
        groups = {scene.group_of[item.fqn] for cell in box.cells for item in cell.items if item.fqn in scene.group_of}
        if len(groups) == 1:
            bar = tag("rect", x=_px(left), y=_px(start), width=5, height=_px(stop - start), rx=2.5, class_="q")
            parts.append(tag("g", bar, class_=group_class(groups.pop())))
        names = label_lines(box.name, MAX_LABEL, max(MAX_LINES, int(line.height // LINE_PITCH)))
        y = top + CHIP_HEIGHT / 2 + 4 - LINE_PITCH / 2 * (min(MAX_LINES, len(names)) - 1)
        parts += [
            tag("text", text, x=_px(left + 11), y=_px(y + LINE_PITCH * at), class_="l") for at, text in enumerate(names)
        ]
        yield tag("g", *parts)


def _grid_frame(placed: Placed, left: float, top: float) -> Markup:
    frame = {"x": _px(left + placed.x - 3), "y": _px(top - 3), "width": _px(placed.width + 6)}
    return tag("rect", **frame, height=_px(placed.height + 6), rx=5, class_="f")


def _items(scene: Scene, box: str, placed: Placed, sizes: Sizes, corner: tuple[float, float]) -> Iterator[Markup]:
    for index, item in enumerate(placed.cell.items):
        x, y = placed.corner(index, sizes)
        x, y = x + corner[0], y + corner[1]
        if item.fqn:
            yield _chip(scene, item, box, sizes.chip, (x, y))
        else:
            width = placed.width if placed.num_columns == 1 else sizes.chip
            yield _join(scene.site(item), len(item.nodes), (x + width / 2, y + CHIP_HEIGHT / 2))


def _chip(scene: Scene, item: Item, box: str, width: float, corner: Point) -> Markup:
    site, group = scene.site(item), scene.group_of.get(item.fqn)
    room = int((width - STRIPE - CHIP_PADDING - 3) / width_of("x", SHAPE_SIZE))
    shape = clip(drawn_shape(scene, site, item.fqn), room)
    body = tag("rect", width=_px(width), height=CHIP_HEIGHT, rx=4, class_="c a" if site.kind == "again" else "c")
    stripe = tag("path", d=f"M4 0H{STRIPE:g}V{CHIP_HEIGHT}H4a4 4 0 0 1-4-4V4a4 4 0 0 1 4-4z", class_="q")
    number = "" if group is None else str(group + 1)
    parts = [tag("title", _words(scene, item.fqn, site)), body, stripe]
    parts += [tag("path", d="M1 9L9 1M7 9L15 1M1 31L9 23M7 31L15 23", class_="z m")] * is_striped(group)
    parts += [tag("text", number, x=STRIPE / 2, y=20, class_="k")] * (group is not None)
    parts.append(tag("text", drawn_name(site, item.fqn, box), x=STRIPE + CHIP_PADDING, y=13.5, class_="n"))
    parts.append(tag("text", shape, x=STRIPE + CHIP_PADDING, y=26, class_="s"))
    return tag("g", *parts, transform=f"translate({_px(corner[0])} {_px(corner[1])})", class_=group_class(group))


def _words(scene: Scene, fqn: str, site: Site) -> str:
    """What hovering over a weight tells."""
    lines = [fqn, f"{list(scene.shape(fqn))} {site.fn}".rstrip()]
    weight = scene.weights.get(fqn)
    if weight is None:
        lines.append(f"dense: {scene.reasons.get(fqn, 'not planned')}")
    else:
        group = scene.group_of[fqn]
        lines.append(f"group {group + 1} of {len(scene.plan.groups)}: {scene.plan.groups[group].name}")
        lines.append(f"sparsity {format_share(weight.sparsity)}, pattern {weight.pattern}")
        lines += [f"also {alias}" for alias in weight.aliases]
    lines += [f"used again in {site.scope or 'the root'}"] * (site.kind == "again")
    lines += [f"{site.num_uses} uses, drawn once"] * (site.num_uses > 1)
    return "\n".join(lines)


def _join(site: Site, count: int, centre: Point) -> Markup:
    kind = join_kind(site.fn)
    number = f"{site.num_uses} joins" if kind == LOOP else WORDS[kind]
    words = f"{number} in {site.scope or 'the root'}" + f", {count} side by side" * (count > 1)
    parts = (tag("title", words), tag("circle", r=JOIN_SIZE / 2, class_="i"), tag("path", d=SIGNS[kind], class_="m"))
    return tag("g", *parts, transform=f"translate({_px(centre[0])} {_px(centre[1])})")


def _edges(scene: Scene, routed: Routed) -> Iterator[Markup]:
    names = {node: item.fqn for box in scene.boxes for cell in box.cells for item in cell.items for node in item.nodes}
    for net, paths in routed.paths.items():
        line = "".join(rounded(points) for points in paths)
        tips = "".join(arrow(points) for points in paths)
        source = names[net] or f"{WORDS[join_kind(scene.model.graph.nodes[net]['site'].fn)]} {net}"
        title = tag("title", f"from {source}")
        yield tag("g", title, tag("path", d=line, class_="e"), tag("path", d=tips, class_="p"))


def rounded(points: Sequence[Point]) -> str:
    """SVG path through the points with round corners."""
    parts = [f"M{_px(points[0][0])} {_px(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        start, end = _towards(corner, before), _towards(corner, after)
        parts.append(f"L{_pair(start)}Q{_pair(corner)} {_pair(end)}")
    parts.append(f"L{_pair(points[-1])}")
    return "".join(parts)


def arrow(points: Sequence[Point]) -> str:
    """SVG path of the arrow at the end."""
    (x, y), (before_x, before_y) = points[-1], points[-2]
    if abs(x - before_x) >= abs(y - before_y):
        back = -5 if x >= before_x else 5
        return f"M{_px(x)} {_px(y)}l{back} -3v6z"
    back = -5 if y >= before_y else 5
    return f"M{_px(x)} {_px(y)}l-3 {back}h6z"


def _towards(corner: Point, other: Point) -> Point:
    distance = abs(other[0] - corner[0]) + abs(other[1] - corner[1])
    share = min(RADIUS, distance / 2) / distance if distance else 0.0
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def _pair(point: Point) -> str:
    return f"{_px(point[0])} {_px(point[1])}"


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
