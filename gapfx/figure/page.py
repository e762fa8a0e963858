"""Where everything stands: lines and rails from top to bottom, columns and gutters from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gapfx.figure.lines import CHANNEL, CHIP_HEIGHT, JOIN_SIZE, PAD, Line, Placed, Sizes, item_places
from gapfx.figure.tracks import Tracks, num_tracks

PITCH = 6.0  # pixels between two tracks
GAP, INNER_GAP, RAIL_MARGIN = 12.0, 8.0, 6.0  # smallest space between boxes and between lines of one box
GUTTER = 14.0


@dataclass(frozen=True)
class Port:
    """Where an item stands, and where its edges meet it, from the left edge of its box and the top of its line."""

    column: int
    line: int
    cell: int
    left: float
    right: float
    y: float
    cell_left: float
    cell_right: float
    has_top: bool = False
    has_bottom: bool = False

    @property
    def middle(self) -> float:
        """Where an edge from above or below meets a join."""
        return (self.left + self.right) / 2

    @property
    def enter_x(self) -> float:
        """About where an edge comes down to it."""
        return self.middle if self.has_top else self.cell_left - CHANNEL / 2

    @property
    def exit_x(self) -> float:
        """About where an edge leaves it downwards."""
        return self.middle if self.has_bottom else self.cell_right + CHANNEL / 2


def find_ports(columns: Sequence[Sequence[Line]], sizes: Sizes) -> dict[str, Port]:
    """Node -> its port; that of the first weight where several belong to one node."""
    ports: dict[str, Port] = {}
    for column, line, at, index, item in item_places(columns):
        port = _port((column, line, at), columns[column][line].cells[at], index, sizes)
        for node in item.nodes:
            ports.setdefault(node, port)
    return ports


def _port(place: tuple[int, int, int], placed: Placed, index: int, sizes: Sizes) -> Port:
    left, right = placed.x, placed.x + placed.width
    if placed.cell.is_grid:
        return Port(*place, left, right, CHIP_HEIGHT / 2, left, right)
    y = placed.corner(index, sizes)[1] + CHIP_HEIGHT / 2
    if placed.cell.items[index].fqn:
        return Port(*place, left, right, y, left, right)
    start = left + (placed.width - JOIN_SIZE) / 2
    is_last = index == len(placed.cell.items) - 1
    return Port(*place, start, start + JOIN_SIZE, y, left, right, index == 0, is_last)


@dataclass(frozen=True)
class Rows:
    """Tops of the lines of every column, the first tracks of the rails above and below them, and the bottom."""

    tops: tuple[tuple[float, ...], ...]
    rails: tuple[tuple[float, ...], ...]
    bottom: float

    def rail(self, column: int, row: int, track: int) -> float:
        """Height of a track of the rail above line `row`, or below the last line."""
        return self.rails[column][row] + track * PITCH


def stack_rows(columns: Sequence[Sequence[Line]], tracks: Tracks) -> Rows:
    """Lines below each other with as much space between them as their rails need."""
    tops, rails, bottoms = list[tuple[float, ...]](), list[tuple[float, ...]](), list[float]()
    for column, lines in enumerate(columns):
        y = 0.0
        own_tops, own_rails = list[float](), list[float]()
        for row, line in enumerate(lines):
            space = _space(num_tracks(tracks, ("rail", column, row)), GAP if line.is_first else INNER_GAP)
            own_rails.append(y + _first_track(num_tracks(tracks, ("rail", column, row)), space))
            y += space + PAD * line.is_first
            own_tops.append(y)
            y += line.height + PAD * line.is_last
        last = num_tracks(tracks, ("rail", column, len(lines)))
        space = _space(last, GAP)
        own_rails.append(y + _first_track(last, space))
        tops.append(tuple(own_tops))
        rails.append(tuple(own_rails))
        bottoms.append(y + space)
    return Rows(tuple(tops), tuple(rails), max(bottoms))


def _space(count: int, least: float) -> float:
    return max(least, 2 * RAIL_MARGIN + PITCH * (count - 1))


def _first_track(count: int, space: float) -> float:
    return (space - PITCH * max(0, count - 1)) / 2


@dataclass(frozen=True)
class Shape:
    """Left edges and widths of columns and gutters; gutter c is left of column c, and one more is at the end."""

    lefts: tuple[float, ...]
    widths: tuple[float, ...]
    gutters: tuple[float, ...]
    width: float

    def gutter(self, index: int, track: int) -> float:
        """Place of a track."""
        return self.gutters[index] + RAIL_MARGIN + 1 + track * PITCH


def column_width(lines: Sequence[Line]) -> float:
    """Of all boxes of one column."""
    return max(line.width for line in lines)


def spread_columns(columns: Sequence[Sequence[Line]], tracks: Tracks) -> Shape:
    """Columns beside each other with as much space between them as their gutters need."""
    x, lefts, gutters = 0.0, list[float](), list[float]()
    widths = [column_width(lines) for lines in columns]
    for index in range(len(columns) + 1):
        gutters.append(x)
        count = num_tracks(tracks, ("gutter", index))
        is_inner = 0 < index < len(columns)
        x += max(GUTTER if is_inner else 0.0, 2 * RAIL_MARGIN + PITCH * count if count else 0.0)
        if index < len(columns):
            lefts.append(x)
            x += widths[index]
    return Shape(tuple(lefts), tuple(widths), tuple(gutters), x)
