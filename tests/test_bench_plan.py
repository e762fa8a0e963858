"""Capture and plan do work that grows with the layers, not with their square; seconds are for the tool alone."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gapfx.sparse import CompileOptions, compile_model
from tools.bench_plan import Case, Experts, Hourglass, Nested, Residual, Scan, measure, transformer

SMALL, LARGE = 24, 96
GROWS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda n: nn.Sequential(*(nn.Linear(8, 8) for _ in range(n))), (2, 8)),
    "residual": (lambda n: nn.Sequential(*(Residual(4) for _ in range(n))), (2, 4, 8, 8)),
    "transformer": (lambda n: transformer(n // 4), (2, 4, 32)),
    "nested": (lambda n: Nested(4, n // 4), (2, 4)),
    "hourglass": (lambda n: Hourglass(4, n), (2, 4)),
    "experts": (lambda n: nn.Sequential(*(Experts(8, 4) for _ in range(n // 4))), (64, 8)),
    "scan": (lambda n: nn.Sequential(*(Scan(4) for _ in range(n // 4))), (2, 16, 4)),
}


def test_the_cost_of_a_small_model_is_measured() -> None:
    cost = measure(Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (2, 4)))
    assert (cost.num_weights, cost.num_nodes) == (2, 5)
    assert cost.limit == 3 * cost.forward + 2


def num_calls(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Calls of functions, of Python and of C, that capture, plan and masks take."""
    x, count = torch.randn(shape), [0]

    def saw(frame: object, event: str, argument: object) -> None:
        count[0] += event in ("call", "c_call")

    sys.setprofile(saw)
    try:
        compile_model(model, lambda module: module(x), CompileOptions())
    finally:
        sys.setprofile(None)
    return count[0]


@pytest.mark.parametrize("name", GROWS)
def test_four_times_the_layers_are_four_times_the_work(name: str) -> None:
    build, shape = GROWS[name]
    num_calls(build(SMALL), shape)  # what is made once
    small, large = num_calls(build(SMALL), shape), num_calls(build(LARGE), shape)
    assert large / small < 1.15 * LARGE / SMALL
