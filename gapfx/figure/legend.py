"""What stands above a figure: the model, its groups with their sizes, and the signs that the figure uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gapfx.figure.drawing import SIGNS, WORDS, join_kind
from gapfx.figure.labels import NAME_SIZE, SHAPE_SIZE, clip, width_of
from gapfx.figure.lines import JOIN_SIZE
from gapfx.figure.palette import group_class, is_striped
from gapfx.figure.scene import Scene
from gapfx.quantities import format_count, format_share
from gapfx.report.markup import Markup, join, tag

ENTRY_HEIGHT, LINE_HEIGHT, KEY_HEIGHT = 36, 17, 30
MAX_NAME = 44
SANS_CHAR = 0.56  # width of a letter, in units of the font's size


@dataclass(frozen=True)
class Entry:
    """A colour of the legend."""

    group: int | None
    full_name: str
    words: str

    @property
    def name(self) -> str:
        """As much of the name as is shown."""
        return clip(self.full_name, MAX_NAME)

    @property
    def width(self) -> float:
        """Pixels with the swatch and the space to the next one."""
        return 26 + max(width_of(self.name, NAME_SIZE), width_of(self.words, SHAPE_SIZE)) + 24


def entries(scene: Scene) -> list[Entry]:
    """One for each group, then the weights that stay dense and are drawn."""
    total = sum(group.numel for group in scene.plan.groups)
    found = [
        Entry(index, group.name, _size(len(group.weights), group.numel, group.numel / max(1, total)))
        for index, group in enumerate(scene.plan.groups)
    ]
    drawn = {item.fqn for box in scene.boxes for cell in box.cells for item in cell.items if item.fqn}
    dense = sorted(drawn - set(scene.weights))
    numel = sum(math.prod(scene.shape(fqn)) for fqn in dense)
    return [*found, *([Entry(None, "dense", _size(len(dense), numel))] if dense else [])]


def _size(count: int, numel: int, share: float | None = None) -> str:
    words = f"{count} weight{'s' * (count != 1)}, {format_count(numel)} element{'s' * (numel != 1)}"
    return words if share is None else f"{words}, {format_share(share)}"


@dataclass(frozen=True)
class Legend:
    """The drawn legend and its height in pixels."""

    markup: Markup
    height: float


def least_width(scene: Scene) -> float:
    """Pixels of the widest line of the legend."""
    lines = [SANS_CHAR * 12 * len(line) for line in _lines(scene)]
    return max(SANS_CHAR * 17 * len(scene.model.title), *lines, *(entry.width for entry in entries(scene)))


def draw_legend(scene: Scene, width: float) -> Legend:
    """Title, lines of text, entries in as many columns as fit, and the signs."""
    lines = _lines(scene)
    parts = [tag("text", scene.model.title, x=0, y=16, class_="h")]
    parts += [tag("text", line, x=0, y=36 + at * LINE_HEIGHT, class_="t") for at, line in enumerate(lines)]
    found = entries(scene)
    widest = max((entry.width for entry in found), default=1.0)
    rows = math.ceil(len(found) / max(1, min(len(found), int(width // widest))))
    top = 38 + len(lines) * LINE_HEIGHT
    for index, entry in enumerate(found):
        column, row = divmod(index, rows)
        parts.append(_entry(entry, column * widest, top + row * ENTRY_HEIGHT))
    bottom = top + rows * ENTRY_HEIGHT
    x = 0.0
    for sign, words in _signs(scene):
        text = tag("text", words, x=14, y=4, class_="t")
        parts.append(tag("g", sign, text, transform=f"translate({x + 9:.0f} {bottom + 8})"))
        x += 40 + SANS_CHAR * 12 * len(words)
    return Legend(join(parts), bottom + (KEY_HEIGHT if x else 8))


def _lines(scene: Scene) -> tuple[str, ...]:
    return _summary(scene), *scene.notes


def _summary(scene: Scene) -> str:
    plan = scene.plan
    numel, count = sum(group.numel for group in plan.groups), len(scene.weights)
    groups = f"{len(plan.groups)} group{'s' * (len(plan.groups) != 1)} ({plan.partition})"
    return f"{_size(count, numel)} in {groups}, sparsity {format_share(plan.sparsity)}"


def _entry(entry: Entry, x: float, y: float) -> Markup:
    parts = [tag("title", f"{entry.full_name}: {entry.words}"), tag("rect", width=18, height=26, rx=4, class_="q")]
    parts += [tag("path", d="M1 7L7 1M7 7L13 1M4 25L10 19M10 25L16 19", class_="z m")] * is_striped(entry.group)
    if entry.group is not None:
        parts.append(tag("text", str(entry.group + 1), x=9, y=17, class_="k"))
    parts += [tag("text", entry.name, x=26, y=10, class_="n"), tag("text", entry.words, x=26, y=23.5, class_="s")]
    return tag("g", *parts, transform=f"translate({x:.0f} {y})", class_=group_class(entry.group))


def _signs(scene: Scene) -> Iterator[tuple[Markup, str]]:
    sites = [scene.site(item) for box in scene.boxes for cell in box.cells for item in cell.items]
    kinds = {join_kind(site.fn) for site in sites if site.kind == "join"}
    for kind in SIGNS:
        if kind in kinds:
            circle = tag("circle", r=JOIN_SIZE / 2, class_="i")
            yield join((circle, tag("path", d=SIGNS[kind], class_="m"))), WORDS[kind]
    if any(site.kind == "again" for site in sites):
        yield tag("g", tag("rect", x=-8, y=-7, width=16, height=14, rx=3, class_="c a"), class_="d"), "used again"
