"""The module tree of an outline: GraphModules for what was recorded op by op, else the model's own modules."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn

from gapfx.capture.facts import Capture
from gapfx.capture.leaves import is_script
from gapfx.capture.names import Names

# The child that holds constant tensors, and tensors whose names cannot be written in code.
TENSORS = "_tensors"


@dataclass(frozen=True)
class Body:
    """One forward of a module. Equal to another body when every node has the same name, op, target and arguments."""

    graph: fx.Graph = field(compare=False)
    lines: tuple[tuple[Any, ...], ...]


def body_of(graph: fx.Graph) -> Body:
    """The body that a finished graph is."""
    lines = ((node.op, node.name, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes)
    return Body(graph, tuple(lines))


@dataclass(frozen=True)
class Called:
    """A module by its first FQN, and the number of its body; None: the model's own module."""

    fqn: str
    body: int | None


@dataclass(frozen=True)
class Parts:
    """By first FQN of a module: its bodies, and what these call and read under names that the model does not have.

    `attributes` are nodes of the flat graph that read an object or a tensor.
    """

    bodies: dict[str, list[Body]]
    links: dict[str, dict[str, Called]]
    attributes: dict[str, dict[str, fx.Node]]


class Link(nn.Module):
    """A child that stands for a module held elsewhere: no child, parameter or state_dict key of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.target: tuple[nn.Module, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the other module returns."""
        return self.target[0](*args, **kwargs)


class Outlined(fx.GraphModule):
    """The root of an outline; `evaluation` holds the root for eval, when there is one."""

    evaluation: tuple[fx.GraphModule, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body for the present mode."""
        if self.evaluation and not self.training:
            return self.evaluation[0](*args, **kwargs)
        return super().__call__(*args, **kwargs)


def build_tree(capture: Capture, parts: Parts, top: int) -> Outlined:
    """The tree with all graphs in place; `top` is the body of the root."""
    return _Mirror(capture, parts, top).root()


class _Mirror:
    def __init__(self, capture: Capture, parts: Parts, top: int) -> None:
        self.model, self.parts, self.top = capture.model, parts, top
        self._flat = capture.graph_module
        self._names = Names(capture.model)
        self._by_fqn = {fqn: module for fqn, module in capture.model.named_modules()}
        self._made: dict[int, nn.Module] = {}
        self._bodies: dict[tuple[str, int], nn.Module] = {}

    def root(self) -> Outlined:
        root = self._mirror(self.model)
        assert isinstance(root, Outlined)
        for fqn, bodies in self.parts.bodies.items():
            self._add_bodies(fqn, len(bodies))
        for fqn, links in self.parts.links.items():
            for name, called in links.items():
                link = vars(self._mirror(self._by_fqn[fqn]))["_modules"][name]
                link.target = (self._callee(called),)
        for (fqn, index), module in self._bodies.items():
            if isinstance(module, fx.GraphModule):
                _set_graph(module, self.parts.bodies[fqn][index].graph)
        return root

    def _mirror(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._made:
            self._made[id(module)] = self._make(module)
        return self._made[id(module)]

    def _make(self, module: nn.Module) -> nn.Module:
        if is_script(module):
            return module
        own: dict[str, nn.Module | None] = vars(module)["_modules"]
        children = {name: None if child is None else self._mirror(child) for name, child in own.items()}
        fqn = self._names.first[id(module)]
        if fqn in self.parts.bodies:
            return self._graph_module(fqn, module, children)
        if all(children[name] is child for name, child in own.items()):
            return module
        shell = object.__new__(type(module))
        vars(shell).update({**vars(module), "_modules": children})
        return shell

    def _graph_module(self, fqn: str, module: nn.Module, children: Mapping[str, nn.Module | None]) -> fx.GraphModule:
        kind = fx.GraphModule if fqn else Outlined
        gm = kind(nn.Module(), fx.Graph(), class_name=type(module).__name__)
        own, tables = vars(module), vars(gm)
        tables.update({table: own[table] for table in ("_parameters", "_buffers", "_non_persistent_buffers_set")})
        tables["_modules"].update(children)
        tables["_modules"].update({name: Link() for name in self.parts.links.get(fqn, ())})
        self._add_attributes(gm, self.parts.attributes.get(fqn, {}))
        gm.training = module.training
        return gm

    def _add_attributes(self, gm: fx.GraphModule, attributes: Mapping[str, fx.Node]) -> None:
        """Boxes as children, tensors as buffers of one child, so that no state_dict key is added."""
        tensors = nn.Module()
        for name, node in attributes.items():
            item: Any = operator.attrgetter(str(node.target))(self._flat)
            if isinstance(item, nn.Module):
                gm.add_module(name, item)
            else:
                tensors.register_buffer(name, item, persistent=False)
        if vars(tensors)["_buffers"]:
            gm.add_module(TENSORS, tensors)

    def _add_bodies(self, fqn: str, count: int) -> None:
        """The GraphModule at the module's place runs one body; each other body shares all that it holds."""
        main = self._mirror(self._by_fqn[fqn])
        for index in range(count):
            if index == (0 if fqn else self.top):
                self._bodies[fqn, index] = main
                continue
            other = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(self._by_fqn[fqn]).__name__)
            for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                vars(other)[table] = vars(main)[table]
            self._bodies[fqn, index] = other

    def _callee(self, called: Called) -> nn.Module:
        if called.body is None:
            return self._mirror(self._by_fqn[called.fqn])
        return self._bodies[called.fqn, called.body]


def _set_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Assign by the property itself: a child or parameter called `graph` would take the place of an assignment."""
    cast(Any, fx.GraphModule.graph).fset(module, graph)
