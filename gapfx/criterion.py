"""Criteria: a score for each weight; a pattern keeps the highest.

A criterion is a function `scores(weight, generator) -> score` of the weight's shape, registered under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gapfx.registry import Registry


class Criterion(Protocol):
    """Scores of one weight; `generator` is the run's own, seeded alike on every rank."""

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Score of the weight's shape, higher = kept."""
        ...


CRITERIA: Registry[Criterion] = Registry("criterion")
_ELEMENTWISE: set[Criterion] = set()
_ORDINAL: set[Criterion] = set()


def elementwise(criterion: Criterion) -> Criterion:
    """Mark a criterion whose score of a weight's element depends on that element alone.

    Ranks that hold a weight in slices score their own; for any other criterion each gets the whole weight for a moment.
    """
    _ELEMENTWISE.add(criterion)
    return criterion


def is_elementwise(criterion: Criterion) -> bool:
    """Whether the criterion was marked so, or is one of a gradient."""
    return isinstance(criterion, GivenGradient) or criterion in _ELEMENTWISE


def ordinal(criterion: Criterion) -> Criterion:
    """Mark a criterion whose scores order the elements of one weight and say nothing of another's.

    One threshold over several weights (`--allocation global`) cannot take it.
    """
    _ORDINAL.add(criterion)
    return criterion


def is_ordinal(criterion: Criterion) -> bool:
    """Whether the criterion was marked so."""
    return criterion in _ORDINAL


@dataclass(frozen=True)
class ByGradient:
    """A criterion that scores elements by their gradient too: `score(weight, gradient)`, element by element.

    Gradients are those of the loss on one batch, taken as if every weight were dense (see gapfx.runtime.gradients).
    """

    score: Callable[[Tensor, Tensor], Tensor]

    def given(self, gradient: Tensor) -> Criterion:
        """The criterion for a weight of that gradient; both may be a slice."""
        return GivenGradient(self.score, gradient)

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Raise TypeError: there is no score without a gradient."""
        raise TypeError("this criterion needs a gradient: use given(gradient)")


@dataclass(frozen=True, eq=False)
class GivenGradient:
    """A criterion for the weight of one gradient, as large as that: no set of marks may keep it."""

    score: Callable[[Tensor, Tensor], Tensor]
    gradient: Tensor

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Score of the weight's shape."""
        return self.score(weight.detach(), self.gradient)


@CRITERIA.register("snip")
@ByGradient
def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w dL/dw|, the connection sensitivity of SNIP (Lee et al., ICLR 2019, equation 4, whose sum orders nothing)."""
    return (weight * gradient).abs()


@CRITERIA.register("magnitude")
@elementwise
def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """|w|: what GaP prunes by."""
    return weight.detach().abs()


@CRITERIA.register("random")
@ordinal
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of 0..n-1, so that no two scores are equal: GaP's masks before the first phase."""
    order = torch.randperm(weight.numel(), generator=generator, device=generator.device)
    return order.view(weight.shape).to(weight.device)
