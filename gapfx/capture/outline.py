"""`outline`: folds a flat recording into a tree of GraphModules that mirrors the module tree."""

from __future__ import annotations

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import fx

from gapfx.capture.facts import Capture
from gapfx.capture.mirror import TENSORS, Called, Outlined, Parts, body_of, build_tree
from gapfx.capture.names import Names, is_plain
from gapfx.errors import CaptureError

KEPT_META = ("shape", "fn", "kind", "fqn")


def outline(train: Capture, evaluation: Capture | None = None) -> fx.GraphModule:
    """A GraphModule for each module whose forward was recorded op by op, its children under the names of the model.

    It takes and returns what `train.graph_module` does. Parameters, buffers and all modules that were not recorded op
    by op (leaves, modules never called) are the model's own, so FQNs and state_dict keys are the model's too. A module
    that ran again by other code has a body for each, reached through a `Link` child of its caller, as are modules that
    the caller does not hold or cannot name. With a recording of the same model in eval, `training` of the root says
    which forward runs.

    Raises CaptureError when the two recordings are of different models.
    """
    root = _outline(train)
    if evaluation is not None:
        if evaluation.model is not train.model:
            raise CaptureError("the recordings in train and in eval are of different models")
        root.evaluation = (_outline(evaluation),)
    return root


def _outline(capture: Capture) -> Outlined:
    outliner = Outliner(capture)
    flat = capture.graph_module
    nodes = [node for node in flat.graph.nodes if node.op in ("call_function", "call_module", "call_method")]
    top = outliner.add_body("", 0, nodes, flat.graph.find_nodes(op="placeholder"), None)
    return build_tree(capture, outliner.parts, top)


def calls_around(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """The calls of modules below the root that a node runs in; a leaf's call belongs to its caller."""
    stack: tuple[tuple[str, int], ...] = node.meta["stack"]
    return stack[1:-1] if node.op == "call_module" else stack[1:]


class Outliner:
    """Cuts the flat graph into one graph for each body of each module."""

    def __init__(self, capture: Capture) -> None:
        self.names = Names(capture.model)
        graph = capture.graph_module.graph
        self.calls = {node: calls_around(node) for node in graph.nodes if node.op.startswith("call_")}
        self.returned = graph.output_node().args[0]
        self.parts = Parts(defaultdict(list), defaultdict(dict), defaultdict(dict))

    def add_body(
        self, fqn: str, depth: int, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: list[fx.Node] | None
    ) -> int:
        """Number of the body of module `fqn` that runs `nodes`, an earlier one where the code is the same.

        `outputs` None: the root, which returns what the model does.
        """
        scope = Scope(self, fqn, inputs)
        for call, run in itertools.groupby(nodes, lambda node: self._call_at(node, depth)):
            if call is None:
                for node in run:
                    scope.copy(node)
            else:
                self._add_child(scope, call[0], depth + 1, list(run))
        scope.finish(self.returned if outputs is None else outputs[0] if len(outputs) == 1 else tuple(outputs))
        body, bodies = body_of(scope.graph), self.parts.bodies[fqn]
        if body not in bodies:
            bodies.append(body)
        return bodies.index(body)

    def _call_at(self, node: fx.Node, depth: int) -> tuple[str, int] | None:
        calls = self.calls[node]
        return calls[depth] if len(calls) > depth else None

    def _add_child(self, scope: Scope, fqn: str, depth: int, nodes: list[fx.Node]) -> None:
        members = set(nodes)
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        inputs = [source for source in sources if source not in members and not self.is_within(source, fqn)]
        outputs = [node for node in nodes if any(user not in members for user in node.users)]
        scope.call(fqn, self.add_body(fqn, depth, nodes, inputs, outputs), inputs, outputs)

    def is_within(self, node: fx.Node, fqn: str) -> bool:
        """Whether a body of module `fqn` reads the node itself: constants, objects, and what lies below the module."""
        if node.op != "get_attr":
            return False
        return "fqn" not in node.meta or bool(self.names.tensor_path(node.meta["fqn"], fqn))


class Scope:
    """One body while it is written: its graph, and what stands there for the nodes of the flat graph."""

    def __init__(self, outliner: Outliner, fqn: str, inputs: Sequence[fx.Node]) -> None:
        self.graph, self.fqn = fx.Graph(), fqn
        self._outliner, self._here = outliner, dict[fx.Node, fx.Node]()
        for index, node in enumerate(inputs):
            name = node.name if node.op == "placeholder" and not fqn else f"arg_{index}"
            self._put(node, self.graph.placeholder(name))

    def copy(self, node: fx.Node) -> None:
        """Write a node of the flat graph."""
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        if node.op == "call_module":
            target = self._module_target(node.meta["fqn"], None)
            self._put(node, self._create(node.op, target, args, kwargs, target.replace(".", "_")))
        else:
            self._put(node, self._create(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name)))

    def call(self, fqn: str, body: int, inputs: list[fx.Node], outputs: list[fx.Node]) -> None:
        """Write a call of a body of another module."""
        target = self._module_target(fqn, body)
        args = tuple(self._get(node) for node in inputs)
        called = self._create("call_module", target, args, {}, target.replace(".", "_"))
        called.meta["fqn"] = fqn
        if len(outputs) == 1:
            self._put(outputs[0], called)
        for index, node in enumerate(outputs if len(outputs) > 1 else ()):
            self._put(node, self.graph.call_function(operator.getitem, (called, index)))

    def finish(self, returned: Any) -> None:
        """Write the output."""
        self.graph.output(self._mapped(returned))

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, self._get)

    def _get(self, node: fx.Node) -> fx.Node:
        if node not in self._here:
            target = self._attribute(node)
            self._put(node, self._create("get_attr", target, (), {}, target.replace(".", "_")))
        return self._here[node]

    def _put(self, node: fx.Node, here: fx.Node) -> None:
        here.meta.update({key: node.meta[key] for key in KEPT_META if key in node.meta})
        self._here[node] = here

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        # fx takes any name, also one that hides the module in the code that it generates.
        return self.graph.create_node(op, target, args, kwargs, name=f"{name}_" if name in ("self", "torch") else name)

    def _attribute(self, node: fx.Node) -> str:
        path, attributes = "", self._outliner.parts.attributes[self.fqn]
        if "fqn" in node.meta:
            path = self._outliner.names.tensor_path(node.meta["fqn"], self.fqn)
            if is_plain(path):
                return path
        name = path.replace(".", "_") or str(node.target)
        while attributes.setdefault(name, node) is not node:
            name += "_"
        return name if node.meta["kind"] == "object" else f"{TENSORS}.{name}"

    def _module_target(self, fqn: str, body: int | None) -> str:
        names, links = self._outliner.names, self._outliner.parts.links[self.fqn]
        path = names.module_path(fqn, self.fqn)
        if path and not body and is_plain(path):
            return path
        name = path.replace(".", "_") if path else f"_foreign_{fqn.replace('.', '_')}"
        name, called = f"{name}__call{body + 1}" if body else name, Called(fqn, body)
        while links.get(name, called) != called or names.has(self.fqn, name):
            name += "_"
        links[name] = called
        return name
