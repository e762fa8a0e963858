"""What can be wrong with a plan of a whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from gapfx.passes.find_blocks import Block
from gapfx.plan import Plan


def faults_of(model: nn.Module, plan: Plan, matrices: set[str]) -> Iterator[str]:
    """Each fault in a sentence; `matrices` are all names of the parameters with two or more dimensions."""
    places = Counter(fqn for weight in plan.weights() for fqn in (weight.fqn, *weight.aliases))
    if not places and matrices:
        reasons = sorted({weight.reason for weight in plan.dense})
        yield f"no prunable weight was found ({'; '.join(reasons[:3])})"
    yield from (f"{fqn} is in {count} groups" for fqn, count in places.items() if count > 1)
    yield from (f"group {group.name} is empty" for group in plan.groups if not group.weights)
    yield from (f"{fqn} is no matrix of the model" for fqn in sorted(set(places) - matrices))
    yield from _unnamed(model, plan, places, matrices)


def _unnamed(model: nn.Module, plan: Plan, places: Counter[str], matrices: set[str]) -> Iterator[str]:
    """Matrices that are neither in a group nor among the dense ones, and those that are both."""
    names: dict[int, list[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if fqn in matrices:
            names.setdefault(id(parameter), []).append(fqn)
    dense = {weight.fqn for weight in plan.dense}
    for shared in names.values():
        in_groups, is_dense = [fqn for fqn in shared if fqn in places], not dense.isdisjoint(shared)
        if bool(in_groups) == is_dense:
            yield f"{shared[0]} is {'both in a group and dense' if is_dense else 'neither in a group nor dense'}"
        elif in_groups and len(in_groups) < len(shared):
            yield f"{shared[0]} is tied under {len(shared)} names, of which the plan knows {', '.join(in_groups)}"


def pieces_of(plan: Plan, blocks: Sequence[Block]) -> tuple[list[str], list[str]]:
    """Blocks in several groups, in a sentence each: those larger than a mean group, and the others, which are faults.

    A block is a repeated part of the model, or one layer: an attention, the experts of a layer.
    """
    group_of, sizes = plan.group_of(), {weight.fqn: weight.numel for weight in plan.weights()}
    mean = sum(sizes.values()) / max(1, len(plan.groups))
    found: tuple[list[str], list[str]] = ([], [])
    for block in blocks:
        planned = [fqn for fqn in block.weights if fqn in group_of]
        groups, numel = {group_of[fqn] for fqn in planned}, sum(sizes[fqn] for fqn in planned)
        if len(groups) > 1:
            found[numel <= mean].append(f"{block.name} ({numel:,} weights) is in {len(groups)} groups")
    return found
