"""An fx graph as rows of plain data, which are equal for equal graphs and can be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class At:
    """An argument that is the value of an earlier row."""

    place: int


@dataclass(frozen=True)
class OpName:
    """A torch op by its name, since the op itself cannot be pickled: namespace, name, overload."""

    parts: tuple[str, ...]

    def find(self) -> Any:
        """The op of this name. Raises AttributeError when no library has it."""
        found: Any = torch.ops
        for part in self.parts:
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Row:
    """A node: what it does, to what, and the name of a placeholder."""

    op: str
    target: Any
    args: Any
    kwargs: Any


def rows_of(graph: fx.Graph) -> tuple[Row, ...]:
    """The nodes of a graph in order."""
    places: dict[Any, Any] = {node: At(place) for place, node in enumerate(graph.nodes)}
    return tuple(
        Row(node.op, _stored(node.target), *fx.map_arg((node.args, node.kwargs), places.__getitem__))
        for node in graph.nodes
    )


def graph_of(rows: Sequence[Row]) -> fx.Graph:
    """The graph that has these rows."""
    graph, nodes = fx.Graph(), list[fx.Node]()

    def value(argument: Any) -> Any:
        return nodes[argument.place] if isinstance(argument, At) else argument

    for row in rows:
        target = row.target.find() if isinstance(row.target, OpName) else row.target
        arguments: Any = map_aggregate((row.args, row.kwargs), value)
        nodes.append(graph.create_node(row.op, target, *arguments))
    return graph


def identity(rows: Sequence[Row]) -> str:
    """Equal for equal rows; functions are equal to themselves alone."""
    return repr([(row.op, _name(row.target), row.args, row.kwargs) for row in rows])


def _stored(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        return OpName((target.namespace, target._schema.name.split("::")[-1], target._overloadname))  # pyright: ignore[reportPrivateUsage]
    if isinstance(target, torch._ops.OpOverloadPacket):  # pyright: ignore[reportPrivateUsage]
        return OpName(tuple(target._qualified_op_name.split("::")))  # pyright: ignore[reportPrivateUsage]
    return target


def _name(target: Any) -> str:
    return str(target) if isinstance(target, (str, OpName)) else f"{target} {id(target)}"
