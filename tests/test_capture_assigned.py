"""Forwards that assign a new tensor to the name of a buffer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gapfx.capture import capture, capture_eval, outline


class Range(nn.Module):
    """Keeps the smallest value seen so far, in a new tensor each time."""

    low: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.low = torch.minimum(self.low, x.detach().min())
        return x - self.low


class Ranged(nn.Module):
    """The second use of `range` reads what the first one assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.range = nn.Linear(4, 4), Range()

    def forward(self, x: Tensor) -> Tensor:
        return self.range(2 * self.linear(self.range(x)))


def states(model: nn.Module, call: Any, batches: list[Tensor]) -> list[Tensor]:
    """Loss, gradient and buffer of one batch after the other."""
    found: list[Tensor] = []
    for x in batches:
        model.zero_grad()
        loss = call(x).square().sum()
        loss.backward()
        gradient = model.get_parameter("linear.weight").grad
        assert gradient is not None
        found += [loss.detach(), gradient.clone(), model.get_buffer("range.low").clone()]
    return found


def test_an_outline_assigns_to_the_buffers_of_the_model_as_the_forward_does() -> None:
    torch.manual_seed(0)
    model, batches = Ranged(), [torch.randn(3, 4) * scale for scale in (1, 2, 0.5)]
    plain = copy.deepcopy(model)
    tree = outline(capture(model, lambda m: m(batches[0])), capture_eval(model, lambda m: m(batches[0])))
    assert model.get_buffer("range.low").item() == 0
    expected = states(plain, plain, batches)
    assert all(map(torch.equal, states(model, tree, batches), expected))
    assert expected[-1].item() < expected[2].item() < 0
    assert torch.equal(tree.eval()(batches[1]), plain.eval()(batches[1]))


class Quantised(nn.Module):
    """Keeps a rounded weight in a buffer; the weight is one all the same."""

    rounded: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("rounded", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.rounded = torch.round(self.weight * 8)
        return nn.functional.linear(x, self.rounded)


def test_keeping_a_weight_in_a_buffer_is_no_use_of_it() -> None:
    [use] = capture(Quantised(), lambda m: m(torch.randn(2, 4))).uses
    assert (use.fn, use.role, use.reason) == ("linear", "gemm", "")


class StraightThrough(Function):
    """Rounds, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        return grad_outputs[0]


class Stored(nn.Module):
    """Holds the method of a Function, taken before anything is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.round = nn.Linear(4, 4), StraightThrough.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.round(self.linear(x)))


def test_a_stored_apply_of_a_function_is_one_node_with_its_own_gradient() -> None:
    model, x = Stored(), torch.randn(3, 4)
    recorded = capture(model, lambda m: m(x))
    assert [node.meta["fn"] for node in recorded.graph_module.graph.nodes if "fn" in node.meta] == [
        "linear",
        "StraightThrough",
        "linear",
    ]
    model(x).square().sum().backward()
    expected = model.linear.weight.grad
    assert expected is not None
    model.zero_grad()
    outline(recorded)(x).square().sum().backward()
    assert model.linear.weight.grad is not None
    assert torch.equal(model.linear.weight.grad, expected)
