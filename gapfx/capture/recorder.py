"""Writes an fx graph while the real forward runs: every torch function and every call of a leaf module is a node."""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodDescriptorType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gapfx.capture.inside import Homes, Spy
from gapfx.capture.leaves import module_fn
from gapfx.capture.memory import Memory, version
from gapfx.capture.values import Values, call_boxed, is_importable, named_tensors, tensors_in

DATA_DEPENDENT = frozenset(
    {"item", "tolist", "numpy", "nonzero", "unique", "masked_select"}
    | {"__bool__", "__int__", "__float__", "__index__", "__contains__"}
)
SIDE_EFFECTS = frozenset({"_set_grad_enabled", "set_grad_enabled"})
# `.grad` and `._base` are not part of the forward's values.
IGNORED_READS = frozenset({"grad", "_base"})
RECORDED_WRITES = frozenset({"requires_grad", "data"})

DUNDER = re.compile(r"__(?P<side>[ri]?)(?P<op>add|sub|mul|matmul|div|truediv|floordiv|mod|pow|and|or|xor)__")

SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})

Scope = tuple[str, int]


class Recorder(TorchFunctionMode):
    """The graph, the scopes and the remarks of one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.module_names = {id(module): fqn for fqn, module in model.named_modules()}
        self.values = Values(self.graph, names_by_id(model), self.stamp)
        self.memory = Memory()
        self.scope: list[Scope] = []
        self.markers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.opaque_reads: set[str] | None = None
        self._homes = Homes(model)
        self._num_calls: Counter[str] = Counter()
        self.failed_in = ""
        self._error: BaseException | None = None
        self._suspended = 0

    @property
    def is_suspended(self) -> bool:
        """Whether a leaf, an opaque Function or a torch function is running: nothing inside is recorded."""
        return self._suspended > 0

    @property
    def module(self) -> str:
        """FQN of the innermost module that is running."""
        return self.scope[-1][0] if self.scope else ""

    def stamp(self, node: fx.Node) -> None:
        """Give a node the present scope."""
        node.meta["stack"] = tuple(self.scope)

    @contextmanager
    def outside(self) -> Generator[None]:
        """Scope of the caller of the present module."""
        own = self.scope.pop()
        try:
            yield
        finally:
            self.scope.append(own)

    @contextmanager
    def inside(self, fqn: str) -> Generator[None]:
        """Scope of one call of a module."""
        self._num_calls[fqn] += 1
        self.scope.append((fqn, self._num_calls[fqn]))
        try:
            yield
        except BaseException as error:
            if error is not self._error:
                self._error, self.failed_in = error, fqn
            raise
        finally:
            self.scope.pop()

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, set[int]]:
        """Call with recording suspended -> (result, storages written during the call)."""
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            before = [(tensor, version(tensor)) for tensor in _flat_tensors((args, kwargs))]
        self._suspended += 1
        try:
            out = function(*args, **kwargs)
        finally:
            self._suspended -= 1
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            written = [tensor for tensor, was in before if was is not None and version(tensor) != was]
            return out, {self.memory.storage(tensor) for tensor in written}

    def spy(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, set[int], Spy]:
        """As `run`, and what ran inside the call. What the call takes gets its node in the present scope."""
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            spy = Spy(self.values, self._homes, _flat_tensors((args, kwargs)))

        def watched(*inputs: Any, **options: Any) -> Any:
            with spy:
                return function(*inputs, **options)

        return *self.run(watched, args, kwargs), spy

    # ---- nodes

    def add_inputs(self, inputs: Sequence[tuple[str, Tensor]]) -> None:
        """One placeholder for each tensor of the inputs that is not the model's own."""
        for name, tensor in inputs:
            node = self.graph.placeholder(name)
            self.stamp(node)
            self.values.put(tensor, node)

    def add_inside(self, node: fx.Node, spy: Spy, out: Any) -> None:
        """Attach what ran inside the call of a node; its results have their nodes by now."""
        inside = spy.finish(_flat_tensors(out))
        for inner in inside.graph.nodes:
            inner.meta["host"] = node
        node.meta["inside"] = inside
        unseen = {source.name for source in inside.entries if source.op != "get_attr"}
        unseen -= {source.name for source in node.all_input_nodes}
        node.meta["mem_deps"] = tuple(sorted({*node.meta["mem_deps"], *unseen}))

    def add_output(self, out: object) -> None:
        """The tensor that the model returned, or the tuple of all tensors in what it returned."""
        result = self.values.node(out) if isinstance(out, Tensor) else tuple(map(self.values.node, tensors_in(out)))
        self.stamp(self.graph.output(result))

    def add_function(self, function: Any, args: Any, kwargs: Any, out: Any, written: set[int]) -> fx.Node:
        """A node for a function call; what generated code cannot import is called through a box."""
        values, fn = self.values, function_name(function)
        function, args = as_importable(function, args)
        node_args, node_kwargs = tuple(values.argument(arg) for arg in args), values.argument(kwargs)
        if not is_importable(function):
            node_args, function = (values.box(function), *node_args), call_boxed
        node = self.graph.create_node("call_function", function, node_args, node_kwargs, name=_op_name(fn, args))
        node.meta["fn"] = fn
        self._finish(node, (args, kwargs), out, written)
        return node

    def add_leaf(self, fqn: str, module: nn.Module, args: Any, kwargs: Any, out: Any, written: set[int]) -> fx.Node:
        """A node for a call of the present module. Boxes and items around it belong to the scope of its parent."""
        values, own = self.values, self.scope[-1]
        with self.outside():
            node = values.module_call(own, tuple(values.argument(arg) for arg in args), values.argument(kwargs))
            node.meta.update(fqn=fqn, fn=module_fn(module))
            self._finish(node, (args, kwargs), out, written)
            node.meta["stack"] = (*self.scope, own)
        return node

    def _finish(self, node: fx.Node, inputs: Any, out: Any, written: set[int]) -> None:
        self.stamp(node)
        self.memory.depend(node, _flat_tensors(inputs), written)
        self._bind(out, node)

    def _bind(self, out: Any, node: fx.Node) -> None:
        """Name the tensors of a result: itself, or items of it at any depth."""
        if isinstance(out, Tensor):
            self.values.put(out, node)
            return
        items = enumerate(cast(Any, out)) if isinstance(out, (tuple, list)) else ()
        for key, item in cast(Mapping[Any, Any], out).items() if isinstance(out, dict) else items:
            if _flat_tensors(item):
                child = self.graph.call_function(operator.getitem, (node, key))
                child.meta["fn"] = "getitem"
                self.stamp(child)
                self._bind(item, child)

    # ---- torch functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and record it."""
        kwargs = kwargs or {}
        if self._suspended:
            self._peek(args, kwargs)
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args, kwargs)
        if name in DATA_DEPENDENT or (name == "__getitem__" and _has_bool_index(args)):
            self.markers[self.module][name.strip("_")] += 1
        out, written = self.run(func, args, kwargs)
        if written or name in SIDE_EFFECTS or _flat_tensors(out):
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                self.add_function(operator.setitem if name == "__setitem__" else func, args, kwargs, out, written)
        return out

    def _attribute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Reads and writes of tensor attributes such as `.T`, `.data`."""
        out, written = self.run(func, args, kwargs)
        attribute = getattr(func.__self__, "__name__", "?")
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            if name == "__get__" and isinstance(out, Tensor) and attribute not in IGNORED_READS:
                self.add_function(getattr, (args[0], attribute), {}, out, written)
            elif name == "__set__" and attribute in RECORDED_WRITES:
                self.add_function(setattr, (args[0], attribute, args[1]), {}, None, {self.memory.storage(args[0])})
        return out

    def _peek(self, args: Any, kwargs: Any) -> None:
        """Inside an opaque Function, remember which parameters are touched."""
        if self.opaque_reads is not None:
            names = self.values.names
            self.opaque_reads |= {names[id(tensor)] for tensor in _flat_tensors((args, kwargs)) if id(tensor) in names}


def names_by_id(model: nn.Module) -> dict[int, str]:
    """id(parameter or buffer) -> its first FQN."""
    names: dict[int, str] = {}
    for fqn, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), fqn)
    return names


def function_name(function: Any) -> str:
    """Plain name of an op: `add` for `Tensor.__radd__`, the class name for a custom autograd Function."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner.__name__
    name = str(getattr(function, "__name__", function))
    if isinstance(function, OpOverload):
        name = name.partition(".")[0]
    dunder = DUNDER.fullmatch(name)
    if dunder:
        return dunder["op"]
    return name.strip("_") if name.startswith("__") and name.endswith("__") else name


def as_importable(function: Any, args: Any) -> tuple[Any, Any]:
    """The call with its operands in the order written, of what generated code can import.

    `Tensor.__rsub__(x, 1)` is `operator.sub(1, x)`.
    """
    wrapped, dunder = getattr(function, "__wrapped__", None), DUNDER.fullmatch(str(getattr(function, "__name__", "")))
    if dunder and dunder["side"] == "r":
        op = {"div": "truediv", "and": "and_", "or": "or_"}.get(dunder["op"], dunder["op"])
        return getattr(operator, op), args[::-1]
    if isinstance(wrapped, MethodDescriptorType) and not is_importable(function):
        return wrapped, args
    return function, args


def _op_name(fn: str, args: Any) -> str:
    """Name for a node: attribute reads are named after the attribute."""
    return str(args[1]) if fn == "getattr" else fn


def input_names(parameter_names: Sequence[str], args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    """(readable name, tensor) for each tensor in the arguments of the root."""
    for index, arg in enumerate(args):
        name = parameter_names[index] if index < len(parameter_names) else f"input_{index}"
        yield from named_tensors(name, arg, 0)
    for name, arg in kwargs.items():
        yield from named_tensors(name, arg, 0)


def _flat_tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    # What most calls take, without the cost of pytree's registry.
    kind = type(value)
    if isinstance(value, Tensor):
        found.append(value)
    elif kind is tuple or kind is list:
        for item in value:
            _gather(item, found)
    elif kind is dict:
        for item in value.values():
            _gather(item, found)
    elif kind not in SCALARS:
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _has_bool_index(args: Any) -> bool:
    return any(index.dtype is torch.bool for index in _flat_tensors(args[1:]))
