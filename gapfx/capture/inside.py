"""What runs inside of calls that show no torch function: autograd Functions, function transforms, ScriptModules."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gapfx.capture.values import Values


@dataclass(frozen=True)
class Inside:
    """The aten ops of one call, for analysis alone.

    `entries` are the placeholders of the tensors that the caller passed, by the caller's node; `exits` the caller's
    nodes of each result, by the op that made it.
    """

    graph: fx.Graph
    entries: Mapping[fx.Node, fx.Node]
    exits: Mapping[fx.Node, tuple[fx.Node, ...]]


@dataclass
class Homes:
    """Storage -> the one parameter in it: a detached parameter is another tensor on the same storage."""

    model: nn.Module
    _found: dict[int, Tensor | None] = field(default_factory=dict[int, Any])

    def of(self, tensor: Tensor) -> Tensor | None:
        """The parameter whose storage the tensor shares, when it is alone there."""
        if not self._found:
            for parameter in self.model.parameters():
                key = storage_key(parameter)
                self._found[key] = None if key in self._found else parameter
        return self._found.get(storage_key(tensor))


def storage_key(tensor: Tensor) -> int:
    """Where the storage of a tensor lies; its own id where it has none."""
    try:
        return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class Spy(TorchDispatchMode):
    """Records the aten ops that run under it. `outer` are the values of the caller's graph."""

    supports_higher_order_operators = True

    def __init__(self, outer: Values, homes: Homes, tensors: list[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._outer, self._homes = outer, homes
        self._values = Values(self.graph, outer.names, lambda node: None)
        self._entries: dict[fx.Node, fx.Node] = {}
        for tensor in tensors:
            self._enter(tensor, outer.node(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and record it."""
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            self.add_op(func, args, kwargs or {}, out)
        return out

    def add_op(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A node for an op, under the name of all its overloads, in place or not."""
        node = self.graph.call_function(func, tuple(self._argument(args)), self._argument(kwargs))
        packet = getattr(func, "overloadpacket", func)
        node.meta["fn"] = str(getattr(packet, "__name__", packet)).removesuffix("_")
        self._bind(out, node)

    def finish(self, results: list[Tensor]) -> Inside:
        """What was recorded, once the results have nodes in the caller's graph."""
        exits: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for tensor in results:
            made = self._values.maker(tensor)
            if made is not None:
                exits[made] = (*exits.get(made, ()), self._outer.node(tensor))
        return Inside(self.graph, self._entries, exits)

    def _enter(self, tensor: Tensor, source: fx.Node) -> None:
        if source not in self._entries:
            self._entries[source] = self.graph.placeholder(f"entry_{len(self._entries)}")
        self._values.put(tensor, self._entries[source])

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (tuple, list)):
            return [self._argument(item) for item in cast(list[Any], value)]
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in cast(dict[str, Any], value).items()}
        return value if isinstance(value, (int, float)) else None  # nothing else says a thing about weights

    def _node(self, tensor: Tensor) -> fx.Node:
        known, source = self._values.maker(tensor), self._outer.maker(tensor)
        if known is None and source is not None:  # taken from around a function, not among its arguments
            self._enter(tensor, source)
            return self._entries[source]
        if known is not None:
            return known
        home = None if id(tensor) in self._outer.names else self._homes.of(tensor)
        return self._values.node(tensor if home is None else home)

    def _bind(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self._values.put(out, node)
        elif isinstance(out, (tuple, list)):
            for index, item in _tensors(out):
                child = self.graph.call_function(operator.getitem, (node, index))
                child.meta["fn"] = "getitem"
                self._bind(item, child)


def _tensors(values: Any) -> Iterator[tuple[int, Any]]:
    return ((index, item) for index, item in enumerate(values) if isinstance(item, (Tensor, tuple, list)))
