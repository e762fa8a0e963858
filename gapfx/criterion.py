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


@CRITERIA.register("magnitude")
def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """|w|: what GaP prunes by."""
    return weight.detach().abs()


@CRITERIA.register("random")
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of 0..n-1, so that no two scores are equal: GaP's masks before the first phase."""
    order = torch.randperm(weight.numel(), generator=generator, device=generator.device)
    return order.view(weight.shape).to(weight.device)
