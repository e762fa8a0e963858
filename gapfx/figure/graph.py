"""What a figure shows of the graph of layers: every weight once, and the joins that a reader needs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx

from gapfx.capture import Capture
from gapfx.layers import Layer, layer_graph

# More joins than this in a row, in one module, are arithmetic or a loop over time: they are drawn as one.
MAX_JOINS = 3
LOOP = "loop"


@dataclass(frozen=True)
class Site:
    """One node of a figure; `again` is a further use, by another module, of weights that stand elsewhere (tied).

    `num_uses` counts the calls of the recorded forward that are drawn as this one.
    """

    kind: Literal["weight", "again", "join"]
    fn: str
    weights: tuple[str, ...]
    scope: str
    num_uses: int = 1


def figure_graph(capture: Capture) -> nx.DiGraph[str]:
    """Directed acyclic graph in execution order; nodes carry `site`.

    Against `layer_graph`: a module that runs again is drawn once, without the edges that lead back to it; joins of
    one flow with itself or with constants are passed over; sums of sums, and concatenations of concatenations, are
    chained, so that a densely connected block has one edge for each layer.
    """
    graph = _without_idle_joins(_with_calls_folded(capture, layer_graph(capture)))
    _chain_joins(graph)
    _merge_joins(graph)
    return _without_idle_joins(_fold_loops(graph))


def site_of(graph: nx.DiGraph[str], name: str) -> Site:
    """What a node shows."""
    return graph.nodes[name]["site"]


def _with_calls_folded(capture: Capture, full: nx.DiGraph[str]) -> nx.DiGraph[str]:
    stacks = {node.name: node.meta.get("stack") or (("", 1),) for node in capture.graph_module.graph.nodes}
    first: dict[object, str] = {}
    home: dict[str, str] = {}
    num_joins: Counter[tuple[str, int]] = Counter()
    for name, layer in _layers(full):
        call = stacks[name][-1]
        key = (layer.weights, layer.scope) if layer.weights else (call[0], layer.fn, num_joins[call])
        num_joins[call] += not layer.weights
        home[name] = first.setdefault(key, name)
    order = {name: index for index, name in enumerate(full)}
    num_uses, shown = Counter(home.values()), set[str]()
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, layer in _layers(full):
        if home[name] == name:
            graph.add_node(name, site=_site(layer, num_uses[name], shown))
            shown.update(layer.weights)
    edges = ((home[source], home[target]) for source, target in full.edges)
    graph.add_edges_from((source, target) for source, target in edges if order[source] < order[target])
    return graph


def _layers(full: nx.DiGraph[str]) -> Iterable[tuple[str, Layer]]:
    return ((name, full.nodes[name]["layer"]) for name in full)


def _site(layer: Layer, num_uses: int, shown: set[str]) -> Site:
    new = tuple(fqn for fqn in layer.weights if fqn not in shown)
    kind = "join" if not layer.weights else "weight" if new else "again"
    return Site(kind, layer.fn, new or layer.weights, layer.scope, num_uses)


def _without_idle_joins(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The graph without joins of fewer than two flows."""
    kept: nx.DiGraph[str] = nx.DiGraph()
    through: dict[str, set[str]] = {}
    for name in graph:
        before = {found for source in graph.predecessors(name) for found in through[source]}
        if site_of(graph, name).kind == "join" and len(before) < 2:
            through[name] = before
            continue
        kept.add_node(name, site=site_of(graph, name))
        kept.add_edges_from((source, name) for source in sorted(before))
        through[name] = {name}
    return kept


def _joins(graph: nx.DiGraph[str]) -> list[str]:
    return [name for name in graph if site_of(graph, name).kind == "join"]


def _chain_joins(graph: nx.DiGraph[str]) -> None:
    """Let a join take what an earlier one of its kind gathered from that one: a + b + c is (a + b) + c."""
    order = {name: index for index, name in enumerate(graph)}
    for name in _joins(graph):
        while (sources := set(graph.predecessors(name))) and len(sources) > 2:
            others = {other for source in sources for other in graph.successors(source) if order[other] < order[name]}
            fits = [other for other in others if _gathers_part(graph, other, name, sources)]
            if not fits:
                break
            best = max(fits, key=lambda other: (graph.in_degree(other), order[other]))
            graph.remove_edges_from([(source, name) for source in graph.predecessors(best) if source in sources])
            graph.add_edge(best, name)


def _gathers_part(graph: nx.DiGraph[str], other: str, name: str, sources: set[str]) -> bool:
    found, own = site_of(graph, other), site_of(graph, name)
    if other in sources or found.kind != "join" or found.fn != own.fn:
        return False
    return set(graph.predecessors(other)) < sources


def _fold_loops(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """Draw many joins of one module, with no weight between them, as one."""
    order = {name: index for index, name in enumerate(graph)}
    folded = graph.copy()
    for names in _loops(graph):
        last = max(names, key=order.__getitem__)
        inside = set(names)
        folded.add_edges_from((s, last) for name in names for s in graph.predecessors(name) if s not in inside)
        folded.add_edges_from((last, t) for name in names for t in graph.successors(name) if t not in inside)
        folded.remove_nodes_from(inside - {last})
        folded.nodes[last]["site"] = replace(site_of(graph, last), fn=LOOP, num_uses=len(names))
    if not nx.is_directed_acyclic_graph(folded):
        return graph
    ordered: nx.DiGraph[str] = nx.DiGraph()
    for name in nx.lexicographical_topological_sort(folded, key=order.__getitem__):
        ordered.add_node(name, site=site_of(folded, name))
    ordered.add_edges_from(folded.edges)
    return ordered


def _loops(graph: nx.DiGraph[str]) -> Iterable[list[str]]:
    """Sets of more than MAX_JOINS joins that feed each other, in one module, behind equally many weights."""
    depth: dict[str, int] = {}
    members: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in graph:
        before = (depth[source] + (site_of(graph, source).kind != "join") for source in graph.predecessors(name))
        depth[name] = max(before, default=0)
        if site_of(graph, name).kind == "join":
            members[site_of(graph, name).scope, depth[name]].append(name)
    for names in members.values():
        if len(names) > MAX_JOINS:
            parts = nx.weakly_connected_components(graph.subgraph(names))
            yield from (sorted(part) for part in parts if len(part) > MAX_JOINS)


def _merge_joins(graph: nx.DiGraph[str]) -> None:
    """Draw a join that only feeds another one of its kind in its module as a part of that one."""
    for name in _joins(graph):
        after, own = list(graph.successors(name)), site_of(graph, name)
        if len(after) != 1:
            continue
        target = site_of(graph, after[0])
        if (target.kind, target.fn, target.scope) == (own.kind, own.fn, own.scope):
            graph.add_edges_from([(source, after[0]) for source in graph.predecessors(name)])
            graph.nodes[after[0]]["site"] = replace(target, num_uses=max(own.num_uses, target.num_uses))
            graph.remove_node(name)
