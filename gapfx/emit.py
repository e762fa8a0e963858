"""The outlined tree of a model as stable text, and the file that shows it after every pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from gapfx.capture import outline
from gapfx.capture.mirror import Link
from gapfx.compiler import Unit
from gapfx.owners import Owner
from gapfx.text import format_graph


def format_outline(tree: fx.GraphModule, owners: Mapping[str, Owner] | None = None) -> str:
    """One section a graph, the root first, callers before what they call; owners with the graph that rewrites edit."""
    sections = [f"[{head}]\n{format_graph(graph)}" for head, graph in _graphs(tree, dict(owners or {}))]
    return "\n".join(sections)


def _graphs(tree: fx.GraphModule, owners: dict[str, Owner]) -> Iterator[tuple[str, fx.GraphModule]]:
    seen: set[int] = set()
    for fqn, module in _in_order("", tree):
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, fx.GraphModule):
            yield f"{fqn or 'root'}: {type(module).__name__}", module
        owner = owners.get(fqn)
        if owner is not None:
            yield f"{fqn or 'root'}: {type(owner.module).__name__}, owner, form {owner.form}", owner.graph


def _in_order(fqn: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield fqn, module
    for name, child in module.named_children():
        path = f"{fqn}.{name}" if fqn else name
        if not isinstance(child, Link):
            yield from _in_order(path, child)
        elif isinstance(child.target[0], fx.GraphModule) and "__call" in name:
            yield path, child.target[0]


class Emitter:
    """The text of a compilation: the captured tree, then every pass, with the whole tree where it changed something."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._tree: fx.GraphModule | None = None
        self._last = ""

    def begin(self, unit: Unit) -> None:
        """Add the tree before any pass."""
        self._tree = outline(unit.capture)
        self._add("captured", unit)

    def after(self, name: str, unit: Unit) -> None:
        """Add what a pass left."""
        self._add(f"after {name}", unit)

    def text(self) -> str:
        """All of it."""
        return "\n".join(self.parts)

    def _add(self, title: str, unit: Unit) -> None:
        assert self._tree is not None
        text = format_outline(self._tree, unit.owners)
        self.parts.append(f"# {title}: unchanged\n" if text == self._last else f"# {title}\n\n{text}")
        self._last = text
