"""A GraphModule that writes its code when it is first needed: most graphs are looked at and never run."""

from __future__ import annotations

import functools
import keyword
import re
from typing import Any, cast

from torch import fx, nn

KEYWORD_ATTRIBUTE = re.compile(rf"\.({'|'.join(keyword.kwlist)})\b(?![\"'])")


# What torch gives every GraphModule, but for what is about its graph: empty containers, and flags.
BLANK: dict[str, Any] = {
    name: value
    for name, value in vars(fx.GraphModule(nn.Module(), fx.Graph())).items()
    if name not in ("_graph", "_code", "_lineno_map", "_prologue_start")
}
CONTAINERS = {name: type(value) for name, value in BLANK.items() if hasattr(value, "__len__") and not value}
FLAGS = {name: value for name, value in BLANK.items() if name not in CONTAINERS}


def spell_keywords(graph: fx.Graph) -> None:
    """Let the code of a graph read modules and parameters that are called `class` or `lambda`."""

    def spell(lines: list[str]) -> list[str]:
        return [KEYWORD_ATTRIBUTE.sub(r'.__getattr__("\1")', line) for line in lines]

    graph.on_generate_code(lambda _: spell)


class LateGraphModule(fx.GraphModule):
    """As GraphModule; the code is generated at the first call, and when it is asked for.

    Until then the instance has no class of its own either: thousands of them would cost seconds.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of this very class."""
        return object.__new__(LateGraphModule)

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "GraphModule") -> None:
        targets = {str(node.target) for op in ("get_attr", "call_module") for node in graph.find_nodes(op=op)}
        if isinstance(root, nn.Module) and targets <= {*vars(root)["_parameters"], *vars(root)["_buffers"]}:
            self._take(root, graph, targets)
        else:
            super().__init__(root, graph, class_name=LateGraphModule.__name__)  # which renames the class
        self._class_name = class_name

    def _take(self, root: nn.Module, graph: fx.Graph, targets: set[str]) -> None:
        """What `GraphModule.__init__` does, without setting attribute by attribute, which takes most of its time."""
        vars(self).update({name: make() for name, make in CONTAINERS.items()}, **FLAGS)
        self.training = root.training
        for table in ("_parameters", "_buffers"):
            vars(self)[table].update({name: own for name, own in vars(root)[table].items() if name in targets})
        self.graph = graph

    def _deepcopy_init(self) -> Any:
        return functools.partial(LateGraphModule.__init__, class_name=self._class_name)

    def recompile(self) -> Any:
        """Mark the code as out of date."""
        cast(Any, self).__class__ = LateGraphModule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Generate the code, which replaces this method, and run it."""
        return generated_forward(self)(self, *args, **kwargs)

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        generated_forward(self)
        return self._code

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, self.graph, self._class_name).__reduce__()


def generated_forward(gm: LateGraphModule) -> Any:
    """The generated forward of a module as a function; no method, whose name a child could have."""
    if type(gm) is LateGraphModule:
        cast(Any, gm).__class__ = type(vars(gm)["_class_name"], (LateGraphModule,), {})
        fx.GraphModule.recompile(gm)
    return type(gm).forward
