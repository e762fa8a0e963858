"""The graph of layers: where weights are used, where data flows join, and in which order they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import networkx as nx
from torch import fx, nn

from gapfx.capture import Capture

JOIN_FNS = frozenset({"add", "mul", "cat", "concat", "concatenate"})


@dataclass(frozen=True)
class Layer:
    """One node: a consumer of weights, or a join of two or more data flows. `scope` is the module it runs in."""

    kind: Literal["weight", "join"]
    fn: str
    weights: tuple[str, ...]
    scope: str


def execution_order(capture: Capture) -> tuple[str, ...]:
    """FQNs of the weights of matrix products, convolutions and embeddings, by first such use."""
    return tuple(dict.fromkeys(use.fqn for use in capture.uses if use.role != "other"))


def layer_of(capture: Capture, fqn: str) -> str:
    """FQN of the module that a weight is a part of: its owner, or the attention that the owner is a part of."""
    owner = capture.parameters[fqn].owner
    parts = owner.split(".") if owner else []
    module = capture.model
    for depth, part in enumerate(parts):
        if isinstance(module, nn.MultiheadAttention):
            return ".".join(parts[:depth])
        module = getattr(module, part)  # a ScriptModule has no get_submodule
    return owner


def layer_graph(capture: Capture) -> nx.DiGraph[str]:
    """Directed acyclic graph in execution order; nodes carry `layer`, an edge is a path through dropped nodes.

    Joins keep residual networks small: with the weights alone every block is linked with every later one.
    """
    weights: dict[str, list[str]] = {}
    for use in capture.uses:
        if use.role != "other":
            weights.setdefault(use.node, []).append(use.fqn)
    graph: nx.DiGraph[str] = nx.DiGraph()
    nearest: dict[str, set[str]] = {}
    for node in capture.graph_module.graph.nodes:
        before = {name for source in _sources(node) for name in nearest.get(source, ())}
        if node.name in weights or _is_join(node):
            graph.add_node(node.name, layer=_layer(node, tuple(dict.fromkeys(weights.get(node.name, ())))))
            graph.add_edges_from((name, node.name) for name in sorted(before))
            before = {node.name}
        nearest[node.name] = before
    return graph


def in_series(graph: nx.DiGraph[str], first: set[str], second: set[str]) -> bool:
    """Whether the output of the nodes `first` reaches a node of `second`."""
    return any(not second.isdisjoint(nx.descendants(graph, name)) for name in first if name in graph)


def _sources(node: fx.Node) -> list[str]:
    return [*(source.name for source in node.all_input_nodes), *node.meta.get("mem_deps", ())]


def _is_join(node: fx.Node) -> bool:
    fn = str(node.meta.get("fn", "")).strip("_")
    data = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return len(data) >= 2 and (fn in JOIN_FNS or fn[1:] in JOIN_FNS)  # iadd, radd


def _layer(node: fx.Node, weights: tuple[str, ...]) -> Layer:
    stack = node.meta.get("stack") or (("", 0),)
    fn = str(node.meta.get("fn", node.op))
    return Layer("weight" if weights else "join", fn, weights, stack[-1][0])
