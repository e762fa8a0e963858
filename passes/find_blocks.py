"""find-blocks: the repeated blocks of the model, and the weights outside of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import networkx as nx
from torch import nn

from gapfx.capture import Capture
from gapfx.compiler import Analysis, Unit, register
from gapfx.layers import execution_order, in_series, layer_graph, layer_of
from gapfx.passes.find_weights import FindWeights

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """Weights that belong together: a repeated module, or one layer outside of every repeated module.

    `name` is the module's FQN, `stage` the FQN of its parent; `weights` are in execution order.
    """

    name: str
    stage: str
    weights: tuple[str, ...]
    is_repeated: bool = True


@register
@dataclass(frozen=True)
class FindBlocks(Analysis[tuple[Block, ...]]):
    """Blocks in execution order, which together hold every prunable weight once.

    A block is one of two or more siblings of one class in a container, with two or more weights each, such as a
    Transformer layer or a bottleneck. Siblings that run one after the other and mostly consist of such blocks are
    stages, and their blocks count instead. Without any container of blocks, equal children of the root count.
    """

    name: ClassVar[str] = "find-blocks"

    def compute(self, unit: Unit) -> tuple[Block, ...]:
        """Blocks by the first use of their first weight."""
        found = unit.latest(FindWeights).prunable
        # What repeats is a matter of structure: weights that stay dense count here, and are left out below.
        parameters = unit.capture.parameters
        tree = _Tree(unit.capture, [fqn for fqn in execution_order(unit.capture) if parameters[fqn].role == "gemm"])
        names = list(tree.blocks("")) or list(tree.siblings(tree.children("")))
        inside = {fqn: name for name in names for fqn in tree.weights(name)}
        blocks: dict[str, list[str]] = {}
        for weight in found:
            blocks.setdefault(inside.get(weight.fqn) or layer_of(unit.capture, weight.fqn), []).append(weight.fqn)
        repeated = set(names)
        return tuple(
            Block(name, name.rpartition(".")[0], tuple(fqns), name in repeated) for name, fqns in blocks.items()
        )


@dataclass(frozen=True)
class _Tree:
    """The module tree of a capture, cut down to the modules that hold weights of matrix products and convolutions."""

    capture: Capture
    fqns: list[str]
    _below: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def __post_init__(self) -> None:
        for fqn in self.fqns:
            parts = fqn.split(".")
            for depth in range(len(parts)):
                self._below.setdefault(".".join(parts[:depth]), []).append(fqn)

    @cached_property
    def _graph(self) -> nx.DiGraph[str]:
        return layer_graph(self.capture)

    def weights(self, name: str) -> list[str]:
        """Weights of a module and its children."""
        return self._below.get(name, [])

    def numel(self, names: list[str]) -> int:
        """Elements of the weights of several modules."""
        return sum(math.prod(self.capture.parameters[fqn].shape) for name in names for fqn in self.weights(name))

    def children(self, name: str) -> list[str]:
        """Children that hold weights."""
        names = (f"{name}.{child}" if name else child for child, _ in self._module(name).named_children())
        return [child for child in names if child in self._below]

    def siblings(self, names: list[str]) -> Iterator[str]:
        """Those of `names` that have two or more weights and share their class with another one."""
        large = [name for name in names if len(self.weights(name)) >= 2]
        kinds = [self._kind(name) for name in large]
        yield from (name for name, kind in zip(large, kinds, strict=True) if kinds.count(kind) >= 2)

    def blocks(self, name: str) -> Iterator[str]:
        """Blocks at or below a module: outermost siblings in containers, or what is inside when those are stages."""
        children = self.children(name)
        repeated = list(self.siblings(children)) if isinstance(self._module(name), CONTAINERS) else []
        by_kind: dict[type[nn.Module], list[str]] = {}
        for child in repeated:
            by_kind.setdefault(self._kind(child), []).append(child)
        inside = {kind: self._stage_blocks(members) for kind, members in by_kind.items()}
        for child in children:
            if child not in repeated:
                yield from self.blocks(child)
            elif inside[self._kind(child)]:
                yield from (block for block in inside[self._kind(child)] if block.startswith(f"{child}."))
            else:
                yield child

    def _stage_blocks(self, members: list[str]) -> list[str]:
        """The blocks inside siblings that are stages; none when the siblings are blocks themselves."""
        inner = [block for member in members for block in self.blocks(member)]
        kinds = {self._kind(block) for block in inner}
        inner += self._single(members, kinds, set(inner))
        is_mostly_inner = 2 * self.numel(inner) > self.numel(members)
        return inner if is_mostly_inner and self._run_in_series(inner) else []

    def _single(self, names: list[str], kinds: set[type[nn.Module]], known: set[str]) -> Iterator[str]:
        """Modules of a block's class that are alone in their container: a stage of one block."""
        for name in names:
            for child in self.children(name):
                if self._kind(child) in kinds and isinstance(self._module(name), CONTAINERS):
                    yield from () if child in known else (child,)
                elif child not in known:
                    yield from self._single([child], kinds, known)

    def _run_in_series(self, blocks: list[str]) -> bool:
        """Whether the first block of one parent feeds the second: experts of one layer do not."""
        by_parent: dict[str, list[str]] = {}
        for block in blocks:
            by_parent.setdefault(block.rpartition(".")[0], []).append(block)
        first, second = max(by_parent.values(), key=len)[:2] if len(blocks) > len(by_parent) else blocks[:2]
        return in_series(self._graph, self._sites(first), self._sites(second))

    def _sites(self, name: str) -> set[str]:
        weights = set(self.weights(name))
        return {use.node for use in self.capture.uses if use.fqn in weights and use.role != "other"}

    def _module(self, name: str) -> nn.Module:
        return self.capture.model.get_submodule(name)

    def _kind(self, name: str) -> type[nn.Module]:
        return type(self._module(name))
