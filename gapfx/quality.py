"""How good the groups of a plan are: what they cost at most, and what they cut apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import networkx as nx

from gapfx.compiler import Unit
from gapfx.layers import Layer, layer_graph
from gapfx.passes.find_blocks import Block, FindBlocks
from gapfx.passes.find_roles import FindRoles, Role
from gapfx.plan import Plan
from gapfx.text import num_kept

MAX_ROLES = 12


@dataclass(frozen=True)
class Quality:
    """Facts about the groups of a plan.

    `sizes` are the elements of each group; `peak` is the largest share of the planned weights that is live when one
    group is dense and the others sparse. `cut` of `num_edges` edges of the layer graph lead from one group to another.
    `split` names the repeated blocks, of `num_blocks`, with weights in several groups; `roles` are those of their
    weights.
    """

    sizes: tuple[int, ...]
    peak: float
    cut: int
    num_edges: int
    split: tuple[str, ...]
    num_blocks: int
    roles: tuple[Role, ...] = ()

    @property
    def balance(self) -> float:
        """The largest group over the mean one: 1 when all are equal."""
        return max(self.sizes) * len(self.sizes) / max(1, sum(self.sizes))


def measure(unit: Unit, plan: Plan) -> Quality:
    """The quality of a plan for the captured model; the plan need not come from the unit."""
    group_of = {fqn: index for fqn, index in _names(plan)}
    graph = layer_graph(unit.capture)
    sides = _groups_of_layers(graph, group_of)
    crossing = sum(sides[first] != sides[second] for first, second in graph.edges)
    blocks = [block for block in unit.latest(FindBlocks) if block.is_repeated]
    split = tuple(block.name for block in blocks if len(_groups_of(block, group_of)) > 1)
    sizes = tuple(group.numel for group in plan.groups)
    return Quality(sizes, _peak(plan), crossing, graph.number_of_edges(), split, len(blocks), unit.latest(FindRoles))


def format_quality(quality: Quality) -> str:
    """The quality in a few lines."""
    lines = [
        f"balance {quality.balance:.2f} (largest group over mean), at most {quality.peak:.1%} of planned weights live",
        f"cut width {quality.cut} of {quality.num_edges} edges between layers, blocks split {_split(quality)}",
    ]
    lines += [f"roles in blocks {_roles(quality.roles)}"] * bool(quality.roles)
    return "\n".join(lines) + "\n"


def _roles(roles: Sequence[Role]) -> str:
    more = len(roles) - MAX_ROLES
    named = ", ".join(f"{role.name} {len(role.weights)}" for role in roles[:MAX_ROLES])
    return named + (f", {more} more" if more > 0 else "")


def _split(quality: Quality) -> str:
    named = f" ({', '.join(quality.split[:3])}{', ...' if len(quality.split) > 3 else ''})" if quality.split else ""
    return f"{len(quality.split)} of {quality.num_blocks}{named}"


def _names(plan: Plan) -> Iterator[tuple[str, int]]:
    for index, group in enumerate(plan.groups):
        yield from ((fqn, index) for weight in group.weights for fqn in (weight.fqn, *weight.aliases))


def _groups_of(block: Block, group_of: Mapping[str, int]) -> set[int]:
    return {group_of[fqn] for fqn in block.weights if fqn in group_of}


def _groups_of_layers(graph: nx.DiGraph[str], group_of: Mapping[str, int]) -> dict[str, int]:
    """Group of each layer; a join or a dense layer goes with the planned layer that ran before it."""
    sides: dict[str, int] = {}
    last = 0
    for name, layer in graph.nodes(data="layer"):
        own = [group_of[fqn] for fqn in cast(Layer, layer).weights if fqn in group_of]
        last = own[0] if own else last
        sides[name] = last
    return sides


def _peak(plan: Plan) -> float:
    sizes = [group.numel for group in plan.groups]
    kept = [num_kept(group.weights) for group in plan.groups]
    live = _live(sizes, kept)
    return max(live) / max(1, sum(sizes)) if live else 0.0


def _live(sizes: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Live weights while each group in turn is dense."""
    return [sum(kept) - own + size for size, own in zip(sizes, kept, strict=True)]


class QualityWatch:
    """Keeps the unit that a compilation leaves, so that its plan can be measured."""

    def __init__(self) -> None:
        self._unit: Unit | None = None

    def begin(self, unit: Unit) -> None:
        """Keep the unit."""
        self._unit = unit

    def after(self, name: str, unit: Unit) -> None:
        """Nothing: passes change the unit in place."""

    def text(self, plan: Plan) -> str:
        """The quality of a plan in a few lines; "" before a compilation, and for a plan without groups."""
        return format_quality(measure(self._unit, plan)) if self._unit and plan.groups else ""
