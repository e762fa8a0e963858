"""Masked models and how tests run them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.compiler import Unit, realise
from gapfx.passes import AllocateSparsity, FindWeights, Partition, default_pipeline
from gapfx.plan import Weight
from tests.models import CASES, captured

EVERYTHING = default_pipeline(FindWeights(embeddings=True), Partition(groups=1))


def masked(name: str) -> tuple[Unit, nn.Module, tuple[Any, ...]]:
    """A case whose every weight is masked with ones, and an untouched copy of the model."""
    make, inputs = CASES[name][0], CASES[name][1]()
    model = make()
    plain = copy.deepcopy(model)
    unit = EVERYTHING.run(Unit(captured(model, *inputs)))
    assert realise(unit) is model
    return unit, plain, inputs


def planned(unit: Unit) -> list[Weight]:
    return list(unit.latest(AllocateSparsity).weights())


def run(model: nn.Module, inputs: tuple[Any, ...], seed: int = 1) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(*inputs)
    output.square().sum().backward()
    return output.detach(), {fqn: parameter.grad for fqn, parameter in model.named_parameters()}


def assert_same(first: Mapping[str, Tensor | None], second: Mapping[str, Tensor | None]) -> None:
    assert list(first) == list(second)
    for fqn, value in first.items():
        other = second[fqn]
        assert (value is None) == (other is None), fqn
        if value is not None and other is not None:
            assert torch.equal(value, other), fqn
