"""Criteria: a score for each weight; a pattern keeps the highest.

A criterion is a function `scores(weight, generator) -> score` of the weight's shape, registered under its name.
"""

from __future__ import annotations

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
    """Whether the criterion was marked so."""
    return criterion in _ELEMENTWISE


def ordinal(criterion: Criterion) -> Criterion:
    """Mark a criterion whose scores order the elements of one weight and say nothing of another's.

    One threshold over several weights (`--allocation global`) cannot take it.
    """
    _ORDINAL.add(criterion)
    return criterion


def is_ordinal(criterion: Criterion) -> bool:
    """Whether the criterion was marked so."""
    return criterion in _ORDINAL


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
