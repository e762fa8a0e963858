"""Outlines of models whose calls show no torch function: checkpoints, custom Functions, ScriptModules, objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.models import Mlp
from tests.test_outline import bodies, check_equals_eager, check_keeps_names


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks(use_reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(8, 8), nn.Sequential(Mlp(), nn.Dropout(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=use_reentrant)

    tree = check_equals_eager(Model(), torch.randn(2, 8))
    assert bodies(tree) == ["", "block", "block.0"]


class Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: object) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grad_outputs[0] @ weight.T * 2, x.T @ grad_outputs[0] * 3, None


@dataclass
class Pair:
    first: Tensor
    second: Tensor


class Functional(nn.Module):
    """A custom Function with an object, constants of its own, a dataclass in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.randn(4, 4)), [torch.ones(4)]

    def forward(self, pair: Pair) -> Pair:
        y: Any = Scale.apply(pair.first, self.weight, {"factor": object()})
        return Pair(y + self.extra[0], pair.second * torch.tensor(3.0))


def test_functions_constants_and_dataclasses() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Functional()

        def forward(self, pair: Pair) -> Pair:
            return self.inner(self.inner(pair))

    model = Outer()
    check_keeps_names(model, check_equals_eager(model, Pair(torch.randn(2, 4), torch.randn(2, 4))))


def test_a_script_module_stays_a_leaf() -> None:
    script: Any = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    model = nn.Sequential(nn.Linear(4, 4), script)
    tree = check_equals_eager(model, torch.randn(2, 4))
    assert tree.get_submodule("1") is script
