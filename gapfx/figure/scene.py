"""Everything that a figure is drawn from: the model's graph in boxes, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from gapfx.compiler import Unit
from gapfx.figure.boxes import Box, Cell, Item, make_boxes
from gapfx.figure.graph import Site, figure_graph, site_of
from gapfx.passes.find_blocks import FindBlocks
from gapfx.plan import Plan, Weight


@dataclass(frozen=True)
class Model:
    """What a capture shows of a model: its class, the graph, the boxes, and the shape of every parameter."""

    title: str
    graph: nx.DiGraph[str]
    boxes: tuple[Box, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, unit: Unit) -> Model:
        """Of a unit that no rewrite has changed yet."""
        capture = unit.capture
        graph = figure_graph(capture)
        repeated = [block for block in unit.latest(FindBlocks) if block.is_repeated]
        blocks = {fqn: block.name for block in repeated for fqn in block.weights}
        shapes = {fqn: parameter.shape for fqn, parameter in capture.parameters.items()}
        return cls(type(capture.model).__name__, graph, tuple(make_boxes(capture, graph, blocks)), shapes)


@dataclass(frozen=True)
class Scene:
    """A model and its plan; `notes` are lines of text that stand below the title."""

    model: Model
    plan: Plan
    notes: tuple[str, ...] = ()

    @cached_property
    def group_of(self) -> dict[str, int]:
        """FQN of a planned weight -> index of its group."""
        return self.plan.group_of()

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """FQN -> the planned weight."""
        return {weight.fqn: weight for weight in self.plan.weights()}

    @cached_property
    def reasons(self) -> dict[str, str]:
        """FQN -> why it stays dense."""
        return {weight.fqn: weight.reason for weight in self.plan.dense}

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the model, and one for planned weights that no layer of the recorded forward takes."""
        shown = {item.fqn for box in self.model.boxes for cell in box.cells for item in cell.items}
        missing = [fqn for fqn in self.weights if fqn not in shown]
        extra = (Box("not in the graph", (Cell(tuple(Item((), fqn) for fqn in missing)),)),) if missing else ()
        return (*self.model.boxes, *extra)

    def site(self, item: Item) -> Site:
        """What an item shows; several joins that are drawn as one are told by the first."""
        return site_of(self.model.graph, item.nodes[0]) if item.nodes else Site("weight", "", (item.fqn,), "")

    def shape(self, fqn: str) -> tuple[int, ...]:
        """Shape of any parameter."""
        return self.weights[fqn].shape if fqn in self.weights else self.model.shapes[fqn]
