"""Weights that this batch did not come to, such as experts without tokens, next to siblings that it did come to."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from gapfx.capture.facts import Use

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
Kind = tuple[str, str, type, tuple[int, ...]]


def with_unreached(model: nn.Module, uses: tuple[Use, ...]) -> tuple[Use, ...]:
    """The uses, and one for each weight that only a sibling of its module used: same class, path below, and shape.

    It stands beside the use of the sibling before it in their container, else of the one after it.
    """
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
    tree = _Tree(model)
    first = {use.fqn: use for use in reversed(uses) if use.role != "other"}
    known: defaultdict[Kind, list[tuple[int, str]]] = defaultdict(list)
    for fqn in first:
        for kind, place in tree.kinds(fqn, shapes[fqn]):
            known[kind].append((place, fqn))
    used = {use.fqn for use in uses}
    added: defaultdict[Use, list[Use]] = defaultdict(list)
    for fqn, shape in shapes.items():
        if len(shape) >= 2 and fqn not in used:
            sibling = _nearest(tree.kinds(fqn, shape), known)
            if sibling:
                added[first[sibling]].append(_assumed(first[sibling], fqn))
    return tuple(item for use in uses for item in (use, *added.pop(use, ())))


def _nearest(kinds: Iterable[tuple[Kind, int]], known: defaultdict[Kind, list[tuple[int, str]]]) -> str:
    for kind, place in kinds:
        places = sorted(known.get(kind, ()))
        if places:
            return places[max(0, bisect_left(places, (place, "")) - 1)][1]
    return ""


def _assumed(use: Use, fqn: str) -> Use:
    """The use of a sibling's weight as the use of `fqn`."""
    old, new = use.fqn.split("."), fqn.split(".")
    depth = next(index for index, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    user = use.user.split(".")
    if user[: depth + 1] == old[: depth + 1]:
        user[depth] = new[depth]
    return dataclasses.replace(use, fqn=fqn, user=".".join(user), is_assumed=True)


class _Tree:
    """Containers of a model and the places of their children."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._places: dict[str, dict[str, int]] = {}

    def kinds(self, fqn: str, shape: tuple[int, ...]) -> Iterator[tuple[Kind, int]]:
        """(what siblings of `fqn` share, its place among them) for each container above it, the innermost first."""
        parts = fqn.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            above, child, below = ".".join(parts[:depth]), parts[depth], ".".join(parts[depth + 1 :])
            if isinstance(self._modules[above], CONTAINERS):
                member = self._modules.get(".".join(parts[: depth + 1]))
                yield (above, below, type(member), shape), self._place(above, child)

    def _place(self, above: str, child: str) -> int:
        if above not in self._places:
            module = self._modules[above]
            names = [*vars(module)["_modules"], *vars(module)["_parameters"]]
            self._places[above] = {name: index for index, name in enumerate(names)}
        return self._places[above][child]
