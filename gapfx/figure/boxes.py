"""The boxes of a figure: one for each block, with its weights and joins in columns by what waits for what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from gapfx.capture import Capture
from gapfx.figure.graph import Site, site_of
from gapfx.layers import layer_of

# More weights than this side by side are drawn as a grid with one way in and one way out.
MAX_STACK = 6
# Neighbours outside of blocks share a box up to this number: a box is never parted between two columns.
MAX_LOOSE = 24


@dataclass(frozen=True)
class Item:
    """One weight, or a join, which has no `fqn`; `nodes` of the graph are drawn by it."""

    nodes: tuple[str, ...]
    fqn: str = ""


@dataclass(frozen=True)
class Cell:
    """Items that do not wait for each other."""

    items: tuple[Item, ...]

    @property
    def is_grid(self) -> bool:
        """Whether its edges meet at the cell and not at each item."""
        return len(self.items) > MAX_STACK

    @property
    def has_weights(self) -> bool:
        """Whether it is as wide as a weight."""
        return any(item.fqn for item in self.items)


@dataclass(frozen=True)
class Box:
    """A block, or neighbouring layers outside of blocks: `name` is the FQN of the module that all are parts of."""

    name: str
    cells: tuple[Cell, ...]


def make_boxes(capture: Capture, graph: nx.DiGraph[str], blocks: Mapping[str, str]) -> list[Box]:
    """Boxes by their first node; `blocks` names the block of a weight. Every node of the graph is in one box."""
    homes = _homes(capture, graph, blocks)
    members: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in graph:
        members[homes[name]].append(name)
    return [Box(name, _cells(graph, nodes)) for (name, _), nodes in members.items()]


def _homes(capture: Capture, graph: nx.DiGraph[str], blocks: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Node -> (name of its box, number of the box outside of blocks, 0 in a block)."""
    order = {name: index for index, name in enumerate(graph)}
    layers = {name: _layer(capture, site_of(graph, name)) for name in graph}
    num_layers = Counter(above for layer in set(layers.values()) for above in _modules_above(layer))
    homes: dict[str, tuple[str, int]] = {}
    names, last, modules = {0: ""}, 0, set(blocks.values())
    num_inside: Counter[int] = Counter()
    for name in graph:
        site = site_of(graph, name)
        block = _block_of(site, blocks, modules)
        if block is not None:
            homes[name], last = (block, 0), 0
        elif site.kind == "join":
            # Behind what ran last: `x + block(x)` in the forward of the model belongs to that block.
            homes[name] = homes[max(graph.predecessors(name), key=order.__getitem__)]
        else:
            parent = next(above for above in _modules_above(layers[name]) if num_layers[above] > 1 or not above)
            is_full = num_inside[last] >= MAX_LOOSE
            if not last or is_full or not (parent == names[last] or (parent and names[last].startswith(f"{parent}."))):
                last = len(names)
            names[last] = parent
            num_inside[last] += 1
            homes[name] = "", last
    return {node: (names[number] if number else name, number) for node, (name, number) in homes.items()}


def _layer(capture: Capture, site: Site) -> str:
    return layer_of(capture, site.weights[0]) if site.kind == "weight" else site.scope


def _modules_above(layer: str) -> list[str]:
    """FQNs of the modules around a layer, the innermost first, the root ("") last."""
    parts = layer.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def _block_of(site: Site, blocks: Mapping[str, str], modules: set[str]) -> str | None:
    """The block of the node's weights when it is one, and for what is in no block the one around its module."""
    found = {blocks.get(fqn) for fqn in site.weights} if site.kind == "weight" else {None}
    if found != {None}:
        return found.pop() if len(found) == 1 else None
    parts = (site.weights[0] if site.kind == "weight" else site.scope).split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), None)


def _cells(graph: nx.DiGraph[str], nodes: list[str]) -> tuple[Cell, ...]:
    columns: defaultdict[int, list[str]] = defaultdict(list)
    inside: nx.DiGraph[str] = graph.subgraph(nodes)
    for name, depth in _depths(inside, nodes).items():
        columns[depth].append(name)
    for names in columns.values():
        names.sort(key=lambda name: not inside.in_degree(name))  # what goes on from the left comes first
    return tuple(Cell(tuple(_items(graph, columns[depth]))) for depth in sorted(columns))


def _depths(inside: nx.DiGraph[str], nodes: list[str]) -> dict[str, int]:
    """Columns of the nodes: as late as what waits for them allows, so that short branches end beside their join."""
    early: dict[str, int] = {}
    for name in nodes:
        early[name] = 1 + max((early[source] for source in inside.predecessors(name)), default=-1)
    late: dict[str, int] = {}
    for name in reversed(nodes):
        late[name] = min((late[target] for target in inside.successors(name)), default=early[name] + 1) - 1
        late[name] = max(late[name], early[name])
    return {name: late[name] for name in nodes}


def _items(graph: nx.DiGraph[str], nodes: list[str]) -> list[Item]:
    joins: defaultdict[str, list[str]] = defaultdict(list)
    for name in nodes:
        site = site_of(graph, name)
        if site.kind == "join":
            joins[site.fn if len(nodes) > MAX_STACK else name].append(name)
    weights = [Item((name,), fqn) for name in nodes for fqn in _fqns(graph, name)]
    return [*weights, *(Item(tuple(names)) for names in joins.values())]


def _fqns(graph: nx.DiGraph[str], name: str) -> tuple[str, ...]:
    site = site_of(graph, name)
    return () if site.kind == "join" else site.weights
