"""find-blocks: the repeated blocks of the model, and the weights outside of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import networkx as nx
from torch import nn

from gapfx.capture import Capture
from gapfx.compiler import Analysis, Unit, register
from gapfx.layers import execution_order, in_series, layer_graph, layer_of
from gapfx.passes.find_weights import FindWeights
from gapfx.repeats import tandem_repeats

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
    stages, and their blocks count instead. Without any container of blocks, equal children of the root count, or the
    layers of a recurrent network (both directions in one), or what repeats in the order of execution by kind of
    product and shape: whichever holds most weights.
    """

    name: ClassVar[str] = "find-blocks"

    def compute(self, unit: Unit) -> tuple[Block, ...]:
        """Blocks by the first use of their first weight."""
        found = unit.latest(FindWeights).prunable
        # What repeats is a matter of structure: weights that stay dense count here, and are left out below.
        parameters = unit.capture.parameters
        tree = _Tree(unit.capture, [fqn for fqn in execution_order(unit.capture) if parameters[fqn].role == "gemm"])
        recurrent = dict(recurrent_layers(unit.capture, tree.fqns))
        inside = tree.members(tree.blocks(""))
        if not inside:
            equal, unnamed = tree.members(tree.equal_children("")), dict(unnamed_blocks(unit.capture, tree.fqns))
            inside = max(equal, recurrent, unnamed, key=len)
        inside = recurrent | inside
        blocks: dict[str, list[str]] = {}
        for weight in found:
            blocks.setdefault(inside.get(weight.fqn) or layer_of(unit.capture, weight.fqn), []).append(weight.fqn)
        repeated = set(inside.values())
        return tuple(
            Block(name, name.rpartition(".")[0], tuple(fqns), name in repeated) for name, fqns in blocks.items()
        )


def recurrent_layers(capture: Capture, fqns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(weight, block) for the weights of recurrent modules with two or more layers: `lstm.weight_ih_l1` is in `lstm.1`.

    The layers of one module are no modules, so that only the names of the weights tell them apart.
    """
    for fqn in fqns:
        owner = capture.parameters[fqn].owner
        module = capture.model.get_submodule(owner)
        number = re.search(r"_l(\d+)(_reverse)?$", fqn)
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and number:
            yield fqn, f"{owner}.{number[1]}" if owner else f"layer {number[1]}"


def unnamed_blocks(capture: Capture, fqns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(weight, block) for weights whose kinds and shapes repeat in the order of execution.

    A block is named after its first layer, or its first weight where other blocks are in that layer too. Repeats of
    single layers say nothing; those that would cut an attention or a recurrent network apart are left out.
    """
    fns = {use.fqn: use.fn for use in reversed(capture.uses) if use.role == "gemm"}
    layers = [layer_of(capture, fqn) for fqn in fqns]
    for repeat in tandem_repeats([(fns[fqn], capture.parameters[fqn].shape) for fqn in fqns]):
        shared = {layers[at] for at in range(repeat.start + 1, repeat.stop) if layers[at] == layers[at - 1]}
        stops = [span.stop for span in repeat.spans() if span.stop < len(fqns)]
        cut = {layers[stop] for stop in stops if layers[stop - 1] == layers[stop]}
        if (repeat.period > 1 or shared) and not any(_is_whole(capture, layer) for layer in cut):
            for span in repeat.spans():
                own = layers[span.start]
                name = own if layers[span.start : span.stop].count(own) == layers.count(own) else fqns[span.start]
                yield from ((fqns[at], name) for at in span)


def _is_whole(capture: Capture, name: str) -> bool:
    return isinstance(capture.model.get_submodule(name), (nn.MultiheadAttention, nn.RNNBase))


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

    def members(self, names: Iterable[str]) -> dict[str, str]:
        """Weight -> the one of `names` that it is in."""
        return {fqn: name for name in names for fqn in self.weights(name)}

    def equal_children(self, name: str) -> Iterator[str]:
        """Children that share their class; lists of modules or parameters are none that run."""
        lists = (*CONTAINERS, nn.ParameterList, nn.ParameterDict)
        return self.siblings([child for child in self.children(name) if not isinstance(self._module(child), lists)])

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
