"""What a node of a recorded graph says about itself, also inside of opaque calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from gapfx.capture.inside import Inside
from gapfx.capture.opsets import Place
from gapfx.capture.values import call_boxed


def fn_of(node: fx.Node) -> str:
    """Name of the op of a node; attribute reads are named after the attribute."""
    fn = node.meta.get("fn", node.op)
    return str(node.args[1]) if node.target is getattr else str(fn)


def user_of(node: fx.Node) -> str:
    """FQN of the innermost module that runs the node."""
    stack = host_of(node).meta.get("stack") or (("", 1),)
    return stack[-1][0]


def host_of(node: fx.Node) -> fx.Node:
    """The node of the recorded graph in whose call a node runs: itself, unless it is inside of an opaque call."""
    return node.meta.get("host", node)


def inside_of(node: fx.Node) -> Inside | None:
    """What runs inside the call of a node, where that was recorded."""
    return node.meta.get("inside")


def argument_places(node: fx.Node, user: fx.Node) -> set[Place]:
    """Positions and keywords at which `user` takes `node`."""
    args: tuple[Any, ...] = user.args[1:] if user.target is call_boxed else user.args
    found: set[Place] = set()
    for place, value in (*enumerate(args), *user.kwargs.items()):
        if value is node or (isinstance(value, (tuple, list, dict, slice)) and node in _nodes_in(value)):
            found.add(place)
    return found


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def num_elements(node: fx.Node) -> int:
    """Elements of the result; of the first item where the result is several tensors."""
    if "shape" not in node.meta:
        node = next((user for user in node.users if fn_of(user) == "getitem" and user.args[1] == 0), node)
    return math.prod(node.meta.get("shape", (0,)))


def active_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the inputs of the model, through values or writes in place, also inside of calls."""
    active: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        is_source = node.op == "placeholder" or node.meta.get("kind") == "constant"
        if (
            is_source
            or not active.isdisjoint(node.all_input_nodes)
            or not names.isdisjoint(node.meta.get("mem_deps", ()))
        ):
            active.add(node)
            names.add(node.name)
        inside = inside_of(node)
        if inside is not None:
            active.update(_active_inside(inside, active))
    return active


def _active_inside(inside: Inside, outer: set[fx.Node]) -> set[fx.Node]:
    active = {entry for source, entry in inside.entries.items() if source in outer}
    for node in inside.graph.nodes:
        if node.meta.get("kind") == "constant" or not active.isdisjoint(node.all_input_nodes):
            active.add(node)
    return active


def numbered(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """Every node with its place in the order of execution, those inside of a call before what the call gives."""
    index = 0
    for node in graph.nodes:
        inside = inside_of(node)
        for inner in inside.graph.nodes if inside is not None else ():
            yield inner, index
            index += 1
        yield node, index
        index += 1
