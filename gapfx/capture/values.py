"""Which node made a tensor, and how Python values are written as arguments of nodes."""

from __future__ import annotations

import dataclasses
import importlib
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name, base_types  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from gapfx.capture.names import RESERVED

MAX_DEPTH = 6


class Box(nn.Module):
    """Holds any Python object as an attribute of a graph."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = (value,)


def unbox(box: Box) -> object:
    """The object in a box."""
    return box.value[0]


def call_boxed(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Calls a function that generated code cannot import by name."""
    return function(*args, **kwargs)


def safe_target(fqn: str) -> str:
    """The FQN as an attribute path of a GraphModule."""
    return f"_own_{fqn}" if fqn.split(".")[0] in RESERVED else fqn


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in a value in order, each once: through containers, dataclasses and attributes of plain objects."""
    found = {id(tensor): tensor for _, tensor in named_tensors("", value, 0)}
    return list(found.values())


def named_tensors(name: str, value: object, depth: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs; the name is the path to the tensor, joined by `_`."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth < MAX_DEPTH:
        for key, item in _items(value):
            yield from named_tensors(f"{name}_{key}" if name else str(key), item, depth + 1)


def _items(value: object) -> Iterable[tuple[object, object]]:
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module, types.ModuleType)):
        return ()
    if isinstance(value, Mapping):
        return cast(Mapping[object, object], value).items()
    if isinstance(value, (tuple, list)):
        return enumerate(cast(list[object], value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    leaves = tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return enumerate(leaves)
    return () if callable(value) else list(getattr(value, "__dict__", {}).items())


def is_importable(function: object) -> bool:
    """Whether the code that fx generates finds `function` again by its qualified name."""
    try:
        name = _get_qualified_name(cast(Any, function))
    except (AttributeError, RuntimeError, TypeError):
        return False
    if name.startswith(("torch.Tensor.", "_operator.", "torch.ops.")):
        return True
    home, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(home or "builtins"), attribute, None) is function
    except (ImportError, ValueError):
        return False


class Values:
    """Tensor -> node during one recording, and the constants and boxes that the graph needs.

    `stamp` is called with every node made here. Tensors are known by identity, checked through a weak reference
    because ids are used again.
    """

    def __init__(self, graph: fx.Graph, names: Mapping[int, str], stamp: Callable[[fx.Node], None]) -> None:
        self.graph, self.names, self.stamp = graph, names, stamp
        self.constants: dict[str, Tensor] = {}
        self.boxes: dict[str, Box] = {}
        self._nodes: dict[int, tuple[Callable[[], Tensor | None], fx.Node]] = {}
        self._reads: dict[str, fx.Node] = {}

    def put(self, tensor: Tensor, node: fx.Node) -> None:
        """From here on `node` is the maker of `tensor`."""
        node.meta.setdefault("shape", tuple(tensor.shape))
        try:
            self._nodes[id(tensor)] = (weakref.ref(tensor), node)
        except TypeError:
            self._nodes[id(tensor)] = (lambda: tensor, node)

    def maker(self, tensor: Tensor) -> fx.Node | None:
        """The node that made a tensor, if one did."""
        found = self._nodes.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def node(self, tensor: Tensor) -> fx.Node:
        """Its maker; else the read of a parameter or buffer; else a new constant."""
        maker = self.maker(tensor)
        if maker is not None:
            return maker
        fqn = self.names.get(id(tensor))
        return self._constant(tensor) if fqn is None else self._read(fqn, tensor)

    def _read(self, fqn: str, tensor: Tensor) -> fx.Node:
        if fqn not in self._reads:
            node = self.graph.create_node("get_attr", safe_target(fqn), name=_node_name(fqn))
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            node.meta.update(fqn=fqn, kind=kind, shape=tuple(tensor.shape))
            self.stamp(node)
            self._reads[fqn] = node
        return self._reads[fqn]

    def _constant(self, tensor: Tensor) -> fx.Node:
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["kind"] = "constant"
        self.stamp(node)
        self.put(tensor, node)
        return node

    def module_call(self, scope: tuple[str, int], args: Any, kwargs: Any) -> fx.Node:
        """A call_module node, named after its module and, from the second call on, the number of the call."""
        fqn, call = scope
        name = _node_name(fqn) + (f"_call{call}" if call > 1 else "")
        return self.graph.create_node("call_module", safe_target(fqn), args, kwargs, name=name)

    def argument(self, value: Any) -> Any:
        """The value as an argument of a node: tensors become nodes, what fx cannot write goes into a box."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (tuple, list)):
            return self._sequence(cast(Any, value))
        if type(cast(object, value)) in (dict, OrderedDict):
            return {key: self.argument(item) for key, item in cast(dict[Any, Any], value).items()}
        if isinstance(value, slice):
            return slice(*(self.argument(part) for part in (value.start, value.stop, value.step)))
        return self._scalar(value)

    def _sequence(self, value: Any) -> Any:
        items = [self.argument(item) for item in value]
        if isinstance(value, list):
            return items
        if isinstance(value, PackedSequence):  # its constructor looks into its arguments: a node has to build it
            node = self.graph.create_node("call_function", PackedSequence, tuple(items))
            self.stamp(node)
            return node
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

    def _scalar(self, value: Any) -> Any:
        kind = type(value)
        if kind.__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", (1,)):
            return value.item()
        if kind not in (bool, int, float) and isinstance(value, (int, float)):
            return self.box(value) if hasattr(value, "name") else kind.__mro__[-2](value)
        if value is None or isinstance(value, (fx.Node, *base_types, type, types.BuiltinFunctionType)):
            return value
        return self.box(value)

    def box(self, value: object) -> fx.Node:
        """A node that gives the Python object back."""
        name = f"_object_{len(self.boxes)}"
        self.boxes[name] = Box(value)
        holder = self.graph.create_node("get_attr", name)
        node = self.graph.create_node("call_function", unbox, (holder,))
        for made in (holder, node):
            made.meta["kind"] = "object"
            self.stamp(made)
        return node


def _node_name(fqn: str) -> str:
    name = fqn.replace(".", "_")
    return f"{name}_" if name in ("self", "torch") else name
