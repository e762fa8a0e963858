"""Lines of a figure: the cells of a box from left to right, and boxes in columns like those of a newspaper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gapfx.chains import cut_min_max
from gapfx.figure.boxes import Box, Cell, Item

# Pixels.
CHIP_HEIGHT, STACK_GAP = 32, 4
JOIN_SIZE = 16
CHANNEL = 22  # between two cells: room for lines that run down
PAD = 6  # inside of a box, above and below
TYPICAL_RAIL = 16  # between two lines

ASPECT = 1.6  # width over height of a screen
MAX_PER_LINE = 8


@dataclass(frozen=True)
class Sizes:
    """Pixels: widths of a weight's chip and of the names of boxes; and chips a line."""

    chip: float
    label: float
    per_line: int

    @property
    def content_left(self) -> float:
        """Where the first channel of a line begins, from the left edge of its box."""
        return self.label + 16


@dataclass(frozen=True)
class Placed:
    """A cell in its line: `x` from the left edge of the box; grids have `num_columns` chips side by side."""

    cell: Cell
    x: float
    width: float
    height: float
    num_columns: int = 1

    def corner(self, index: int, sizes: Sizes) -> tuple[float, float]:
        """Left upper corner of an item, from the left edge of the box and the top of the line."""
        row, column = divmod(index, self.num_columns)
        return self.x + column * (sizes.chip + STACK_GAP), row * (CHIP_HEIGHT + STACK_GAP)


@dataclass(frozen=True)
class Line:
    """Cells side by side in the box number `box`."""

    box: int
    cells: tuple[Placed, ...]
    is_first: bool = False
    is_last: bool = False

    @property
    def width(self) -> float:
        """From the left edge of the box to the end of the last channel."""
        return self.cells[-1].x + self.cells[-1].width + CHANNEL

    @property
    def height(self) -> float:
        """Of the highest cell."""
        return max(cell.height for cell in self.cells)


def box_lines(index: int, box: Box, sizes: Sizes) -> list[Line]:
    """The lines of one box: broken behind joins if possible."""
    parts = list(_parts(box.cells, sizes.per_line))
    ends = range(len(parts))
    return [Line(index, _place(part, sizes), at == 0, at == ends[-1]) for at, part in zip(ends, parts, strict=True)]


def _parts(cells: Sequence[Cell], per_line: int) -> Iterator[list[Cell]]:
    """Breaks lines behind joins where that is enough, and else such that the parts are about equally long."""
    part: list[Cell] = []
    used = 0
    for run in _runs(cells):
        need = sum(_need(cell, per_line) for cell in run)
        if part and used + need > per_line:
            yield part
            part, used = [], 0
        if need > per_line:
            *before, last = _even_parts(run, need, per_line)
            yield from before
            part, used = last, sum(_need(cell, per_line) for cell in last)
        else:
            part, used = part + run, used + need
    yield part


def _runs(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells up to a join and the joins that follow."""
    run: list[Cell] = []
    for cell in cells:
        if run and cell.has_weights and not run[-1].has_weights:
            yield run
            run = []
        run.append(cell)
    yield run


def _even_parts(cells: Sequence[Cell], need: int, per_line: int) -> Iterator[list[Cell]]:
    limit = math.ceil(need / math.ceil(need / per_line))
    part: list[Cell] = []
    used = 0
    for cell in cells:
        if part and _need(cell, per_line) and used + _need(cell, per_line) > limit:
            yield part
            part, used = [], 0
        part.append(cell)
        used += _need(cell, per_line)
    yield part


def _need(cell: Cell, per_line: int) -> int:
    """Chips side by side."""
    return min(len(cell.items), per_line) if cell.is_grid else int(cell.has_weights)


def _place(cells: Sequence[Cell], sizes: Sizes) -> tuple[Placed, ...]:
    placed: list[Placed] = []
    x = sizes.content_left + CHANNEL
    for cell in cells:
        columns = min(len(cell.items), sizes.per_line) if cell.is_grid else 1
        rows = math.ceil(len(cell.items) / columns)
        width = columns * (sizes.chip + STACK_GAP) - STACK_GAP if cell.has_weights else JOIN_SIZE
        placed.append(Placed(cell, x, width, rows * (CHIP_HEIGHT + STACK_GAP) - STACK_GAP, columns))
        x += width + CHANNEL
    return tuple(placed)


def best_columns(boxes: Sequence[Box], chip: float, label: float) -> tuple[Sizes, list[list[Line]]]:
    """Chips a line, and lines of each column, for a page that is shaped like a screen and wastes little."""
    found: list[tuple[float, int, Sizes, list[list[Line]]]] = []
    lines: list[list[Line]] = []
    for per_line in range(1, MAX_PER_LINE + 1):
        sizes, before = Sizes(chip, label, per_line), lines
        lines = [box_lines(index, box, sizes) for index, box in enumerate(boxes)]
        if lines == before:
            break
        heights = [_height(own) for own in lines]
        ideal = math.sqrt(ASPECT * sum(heights) / max(line.width for own in lines for line in own))
        for count in range(max(1, math.floor(ideal) - 1), min(len(boxes), math.ceil(ideal) + 1) + 1):
            parts = cut_min_max([math.ceil(height) for height in heights], count)
            columns = [
                [line for own, part in zip(lines, parts, strict=True) if part == at for line in own]
                for at in range(count)
            ]
            found.append((_badness(columns, len(boxes)), len(found), sizes, columns))
    _, _, sizes, columns = min(found, key=lambda item: item[:2])
    return sizes, columns


def _height(lines: Sequence[Line]) -> float:
    return sum(line.height + TYPICAL_RAIL for line in lines) + 2 * PAD


def _badness(columns: list[list[Line]], num_boxes: int) -> float:
    """0 for a page of a screen's shape with no empty space and every box in one line."""
    widths = [max(line.width for line in lines) for lines in columns]
    heights = [_height(lines) for lines in columns]
    width, height = sum(widths) + CHANNEL * len(columns), max(heights)
    all_lines = [line for lines in columns for line in lines]
    num_torn = sum(line.cells[-1].cell.has_weights and not line.is_last for line in all_lines)
    filled = sum(line.width * (line.height + TYPICAL_RAIL) for lines in columns for line in lines)
    shape = math.log(width / height / ASPECT)
    return abs(shape) + 0.6 * math.log(width * height / filled) + (0.15 * len(all_lines) + 0.25 * num_torn) / num_boxes


def item_places(columns: Sequence[Sequence[Line]]) -> Iterator[tuple[int, int, int, int, Item]]:
    """(column, line, cell, item, the item) of everything that is drawn."""
    for column, lines in enumerate(columns):
        for row, line in enumerate(lines):
            for at, placed in enumerate(line.cells):
                yield from ((column, row, at, index, item) for index, item in enumerate(placed.cell.items))
