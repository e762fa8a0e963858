"""Edges of a figure along rails, gutters and channels: they turn at right angles and cross no box of a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from gapfx.figure.lines import CHANNEL, JOIN_SIZE, Line
from gapfx.figure.page import PITCH, Port, Rows, Shape, column_width, spread_columns, stack_rows
from gapfx.figure.tracks import Tracks, Ways

Point = tuple[float, float]
# direct: to the next cell; over: further on in the line; down: to the next line; far: by a gutter.
Kind = Literal["direct", "over", "down", "far"]


@dataclass(frozen=True)
class Edge:
    """From the node `net` to `target`; `first` and `last` are the gutters of a far edge."""

    net: str
    source: Port
    target: Port
    kind: Kind
    first: int = 0
    last: int = 0

    @property
    def out_rail(self) -> int:
        """Row of the rail that it leaves by."""
        return self.source.line + (self.kind != "over")

    @property
    def in_rail(self) -> int:
        """Row of the rail that it arrives by."""
        return self.target.line

    @property
    def out_way(self) -> tuple[str, int, int]:
        """The rail that it leaves by."""
        return "rail", self.source.column, self.out_rail

    @property
    def in_way(self) -> tuple[str, int, int]:
        """The rail that it arrives by."""
        return "rail", self.target.column, self.in_rail

    @property
    def exits_below(self) -> bool:
        """Whether it leaves a join at its lower end."""
        return self.source.has_bottom and self.kind in ("down", "far")

    @property
    def out_channel(self) -> tuple[str, int, int, int]:
        """The channel right of the source."""
        return "channel", self.source.column, self.source.line, self.source.cell + 1

    @property
    def in_channel(self) -> tuple[str, int, int, int]:
        """The channel left of the target."""
        return "channel", self.target.column, self.target.line, self.target.cell


@dataclass(frozen=True)
class Routed:
    """Rows, shape, height of what runs above the columns, and for every node the paths of the edges that leave it."""

    rows: Rows
    shape: Shape
    top: float
    paths: Mapping[str, tuple[tuple[Point, ...], ...]]


def route(graph: nx.DiGraph[str], ports: Mapping[str, Port], columns: Sequence[Sequence[Line]]) -> Routed:
    """Every edge of the graph; the columns get the space that the edges need."""
    widths = [column_width(lines) for lines in columns]
    nets: dict[Port, str] = {}
    pairs = dict.fromkeys((ports[source], ports[target]) for source, target in graph.edges)
    for name, port in ports.items():
        nets.setdefault(port, name)
    edges = [_edge(nets[source], source, target, widths) for source, target in pairs if source != target]
    ways = Ways()
    for edge in edges:
        _ask_rails(edge, ways, widths)
    tracks = ways.tracks()
    rows = stack_rows(columns, tracks)
    for edge in edges:
        _ask_others(edge, ways, rows, tracks)
    tracks = ways.tracks()
    shape = spread_columns(columns, tracks)
    pen = _Pen(rows, shape, tracks)
    paths: dict[str, list[tuple[Point, ...]]] = {}
    for edge in edges:
        paths.setdefault(edge.net, []).append(tuple(pen.points(edge)))
    top = PITCH * (2 + max(tracks.get("bus", {}).values())) if tracks.get("bus") else 0.0
    return Routed(rows, shape, top, {net: tuple(dict.fromkeys(found)) for net, found in paths.items()})


def _edge(net: str, source: Port, target: Port, widths: Sequence[float]) -> Edge:
    is_same_line = (source.column, source.line) == (target.column, target.line)
    if is_same_line and target.cell == source.cell + 1:
        return Edge(net, source, target, "direct")
    if is_same_line and target.cell > source.cell:
        return Edge(net, source, target, "over")
    if source.column == target.column:
        if target.line == source.line + 1:
            return Edge(net, source, target, "down")
        is_left = source.exit_x + target.enter_x <= widths[source.column]
        gutter = source.column + (not is_left)
        return Edge(net, source, target, "far", gutter, gutter)
    is_forward = target.column > source.column
    return Edge(net, source, target, "far", source.column + is_forward, target.column + (not is_forward))


def _ask_rails(edge: Edge, ways: Ways, widths: Sequence[float]) -> None:
    if edge.kind == "direct":
        return
    half = CHANNEL / 2
    out_x, in_x = edge.source.exit_x, edge.target.enter_x
    if edge.kind == "over":
        out_x = edge.source.cell_right + half
    if edge.kind == "far":
        for way, x, gutter, column in (
            (edge.out_way, out_x, edge.first, edge.source.column),
            (edge.in_way, in_x, edge.last, edge.target.column),
        ):
            end = -half if gutter == column else widths[column] + half
            ways.ask(way, edge.net, min(x - half, end), max(x + half, end))
    else:
        ways.ask(edge.out_way, edge.net, min(out_x, in_x) - half, max(out_x, in_x) + half)


def _ask_others(edge: Edge, ways: Ways, rows: Rows, tracks: Tracks) -> None:
    """Gutters, the bus above the columns, and channels."""
    source_y = rows.tops[edge.source.column][edge.source.line] + edge.source.y
    target_y = rows.tops[edge.target.column][edge.target.line] + edge.target.y
    if edge.kind == "direct":
        if source_y != target_y:
            ways.ask(edge.in_channel, edge.net, source_y, target_y)
        return
    out_y = rows.rail(edge.source.column, edge.out_rail, tracks[edge.out_way][edge.net])
    in_y = rows.rail(edge.target.column, edge.in_rail, tracks[edge.in_way][edge.net])
    if not edge.exits_below:
        ways.ask(edge.out_channel, edge.net, source_y, out_y)
    if not edge.target.has_top:
        ways.ask(edge.in_channel, edge.net, in_y, target_y)
    if edge.kind == "far":
        is_across = edge.first != edge.last
        ways.ask(("gutter", edge.first), edge.net, out_y, 0.0 if is_across else in_y)
        ways.ask(("gutter", edge.last), edge.net, 0.0 if is_across else out_y, in_y)
        if is_across:
            ways.ask("bus", edge.net, *(1000.0 * gutter for gutter in sorted((edge.first, edge.last))))


@dataclass(frozen=True)
class _Pen:
    """Turns routes into points; heights count from the top of the columns, downwards."""

    rows: Rows
    shape: Shape
    tracks: Tracks

    def points(self, edge: Edge) -> list[Point]:
        if edge.kind == "direct":
            return self._direct(edge)
        out_y = self.rows.rail(edge.source.column, edge.out_rail, self.tracks[edge.out_way][edge.net])
        in_y = self.rows.rail(edge.target.column, edge.in_rail, self.tracks[edge.in_way][edge.net])
        start, end = self._exit(edge, out_y), self._enter(edge, in_y)
        return [*start, *(self._between(edge, out_y, in_y) if edge.kind == "far" else []), *end]

    def _between(self, edge: Edge, out_y: float, in_y: float) -> list[Point]:
        first, last = (self._gutter(gutter, edge.net) for gutter in (edge.first, edge.last))
        if edge.first == edge.last:
            return [(first, out_y), (first, in_y)]
        bus = -PITCH * (1 + self.tracks["bus"][edge.net])
        return [(first, out_y), (first, bus), (last, bus), (last, in_y)]

    def _direct(self, edge: Edge) -> list[Point]:
        start, end = self._right(edge.source), self._left(edge.target)
        if start[1] == end[1]:
            return [start, end]
        x = self._channel(edge.in_channel, edge.target, edge.net)
        return [start, (x, start[1]), (x, end[1]), end]

    def _exit(self, edge: Edge, rail_y: float) -> list[Point]:
        port = edge.source
        if edge.exits_below:
            x, y = self.shape.lefts[port.column] + port.middle, self._y(port) + JOIN_SIZE / 2
            return [(x, y), (x, rail_y)]
        x = self._channel(edge.out_channel, port, edge.net, is_right=True)
        return [self._right(port), (x, self._y(port)), (x, rail_y)]

    def _enter(self, edge: Edge, rail_y: float) -> list[Point]:
        port = edge.target
        if port.has_top:
            x = self.shape.lefts[port.column] + port.middle
            return [(x, rail_y), (x, self._y(port) - JOIN_SIZE / 2)]
        x = self._channel(edge.in_channel, port, edge.net)
        return [(x, rail_y), (x, self._y(port)), self._left(port)]

    def _channel(self, way: tuple[str, int, int, int], port: Port, net: str, *, is_right: bool = False) -> float:
        own = self.tracks[way]
        count = 1 + max(own.values())
        start = self.shape.lefts[port.column] + (port.cell_right if is_right else port.cell_left - CHANNEL)
        # The last pixels before a box are for arrows.
        return start + (CHANNEL - 5) * (own[net] + 1) / (count + 1)

    def _gutter(self, index: int, net: str) -> float:
        return self.shape.gutter(index, self.tracks["gutter", index][net])

    def _y(self, port: Port) -> float:
        return self.rows.tops[port.column][port.line] + port.y

    def _right(self, port: Port) -> Point:
        return self.shape.lefts[port.column] + port.right, self._y(port)

    def _left(self, port: Port) -> Point:
        return self.shape.lefts[port.column] + port.left, self._y(port)
