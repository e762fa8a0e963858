"""partition: splits the prunable weights into the groups that grow together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gapfx.chains import cut_equal, cut_min_max, span_name, unique_names
from gapfx.compiler import Analysis, Unit, register
from gapfx.errors import UserError
from gapfx.globs import matches, select
from gapfx.layers import layer_of
from gapfx.passes.find_blocks import Block, FindBlocks
from gapfx.passes.find_weights import FindWeights

Strategy = Literal["blocks", "params", "stages", "random", "by-hand"]
Groups = tuple[tuple[str, tuple[str, ...]], ...]
# What a group is called, and what it holds: weights in execution order.
Named = list[tuple[str, list[str]]]


@register
@dataclass(frozen=True)
class Partition(Analysis[Groups]):
    """(group name, weights) in execution order: disjoint groups that hold every prunable weight.

    - `blocks`: equal counts of consecutive repeated blocks, the paper's split of a Transformer. A weight outside of
      every block joins the group of the block that runs before it, or the first group.
    - `stages`: the parents of the blocks, the paper's split of a ResNet: `layer1` .. `layer4`, with conv1 in the
      first group and fc in the last, by the same rule. The paper's code leaves conv1 and fc in no group, so that
      they would never grow. With fewer groups than stages, consecutive stages are merged to a small largest group.
    - `params`: cuts the chain of blocks so that the largest group is as small as possible, which lowers peak memory.
    - `random`: equal counts of layers drawn at random from `seed`; a control.
    - `by-hand`: one group for each of `globs`, with alternatives separated by `|`; `groups` is not used.
    """

    name: ClassVar[str] = "partition"
    groups: int = 4
    strategy: Strategy = "blocks"
    globs: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the options go together."""
        super().__post_init__()
        if self.groups < 1:
            raise UserError(f"groups={self.groups} is not a number of groups", fix="give 1 or more")
        if bool(self.globs) != (self.strategy == "by-hand"):
            raise UserError("globs and strategy=by-hand go together", fix="give both or neither")

    def compute(self, unit: Unit) -> Groups:
        """Raises UserError when there are fewer blocks than groups, or when a weight is in no glob or in two."""
        if not unit.latest(FindWeights).prunable:
            raise UserError("the model has no prunable weight", fix="`gapfx plan` says why each one stays dense")
        found = self._split(unit)
        names = unique_names([name for name, _ in found])
        return tuple((name, tuple(fqns)) for name, (_, fqns) in zip(names, found, strict=True))

    def _split(self, unit: Unit) -> Named:
        if self.strategy == "by-hand":
            return self._by_hand([weight.fqn for weight in unit.latest(FindWeights).prunable])
        if self.strategy == "random":
            return self._random(unit)
        blocks = unit.latest(FindBlocks)
        if self.strategy == "stages":
            return self._stages(unit, blocks)
        if self.strategy == "params":
            self._check_count(len(blocks), "block")
            return _collect(blocks, cut_min_max(_sizes(unit, blocks), self.groups), [block.name for block in blocks])
        return self._blocks(blocks)

    def _blocks(self, blocks: Sequence[Block]) -> Named:
        anchors = [block for block in blocks if block.is_repeated]
        if len(anchors) < self.groups:
            anchors = list(blocks)
        self._check_count(len(anchors), "block")
        parts = dict(zip(anchors, cut_equal(len(anchors), self.groups), strict=True))
        return _collect(blocks, _fill(blocks, parts), [block.name if block in parts else "" for block in blocks])

    def _stages(self, unit: Unit, blocks: Sequence[Block]) -> Named:
        anchors = [block for block in blocks if block.is_repeated] or list(blocks)
        names = list(dict.fromkeys(block.stage for block in anchors))
        self._check_count(len(names), "stage")
        stage_of = _fill(blocks, {block: names.index(block.stage) for block in anchors})
        sizes = [0] * len(names)
        for size, stage in zip(_sizes(unit, blocks), stage_of, strict=True):
            sizes[stage] += size
        part_of = cut_min_max(sizes, self.groups)
        labels = [block.stage or "(root)" if block in anchors else "" for block in blocks]
        return _collect(blocks, [part_of[stage] for stage in stage_of], labels)

    def _random(self, unit: Unit) -> Named:
        layers: dict[str, list[str]] = {}
        for weight in unit.latest(FindWeights).prunable:
            layers.setdefault(layer_of(unit.capture, weight.fqn), []).append(weight.fqn)
        self._check_count(len(layers), "layer")
        parts = cut_equal(len(layers), self.groups)
        random.Random(self.seed).shuffle(parts)
        names = [f"random-{part}" for part in range(self.groups)]
        groups: Named = [(name, []) for name in names]
        for part, fqns in zip(parts, layers.values(), strict=True):
            groups[part][1].extend(fqns)
        return groups

    def _by_hand(self, fqns: Sequence[str]) -> Named:
        groups: Named = [(glob, list(select(glob, fqns, option="globs of partition"))) for glob in self.globs]
        for fqn in fqns:
            found = [glob for glob in self.globs if matches(glob, fqn)]
            if len(found) != 1:
                where = f"matched by {' and '.join(map(repr, found))}" if found else "matched by no glob"
                raise UserError(
                    f"{fqn} is in {'two groups' if found else 'no group'}",
                    where=where,
                    fix="every prunable weight belongs to one group; keep it dense with find-weights{dense=...}",
                )
        return groups

    def _check_count(self, count: int, unit: str) -> None:
        if count < self.groups:
            have = f"{count} {unit}" if count == 1 else f"{count} {unit}s"
            raise UserError(
                f"{self.groups} groups need {self.groups} {unit}s, the model has {have}",
                where=f"partition with strategy={self.strategy}",
                fix=f"give {count} groups or fewer, or another strategy",
            )


def _fill(blocks: Sequence[Block], parts: dict[Block, int]) -> list[int]:
    """Part of every block: its own, else that of the last block before it that has one, else 0."""
    filled: list[int] = []
    for block in blocks:
        filled.append(parts.get(block, filled[-1] if filled else 0))
    return filled


def _collect(blocks: Sequence[Block], parts: Sequence[int], labels: Sequence[str]) -> Named:
    """Groups named after the labels of their blocks; an empty label does not count."""
    groups: Named = []
    for part in sorted(set(parts)):
        own = [(block, label) for block, label, at in zip(blocks, labels, parts, strict=True) if at == part]
        names = dict.fromkeys(label for _, label in own if label)
        groups.append((span_name(list(names)), [fqn for block, _ in own for fqn in block.weights]))
    return groups


def _sizes(unit: Unit, blocks: Sequence[Block]) -> list[int]:
    shapes = {weight.fqn: weight.shape for weight in unit.latest(FindWeights).prunable}
    return [sum(math.prod(shapes[fqn]) for fqn in block.weights) for block in blocks]
