"""The rule that decides where a trace of a forward is exact."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gapfx.forms import exact_trace

SCALES = {"now": 2.0}


def doubled(x: Tensor) -> Tensor:
    return x * 2


def signed(x: Tensor) -> Tensor:
    return x if x.dim() > 1 else -x


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return doubled(super().forward(input))


class Centred(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Attribute(nn.Linear):
    scale = 1.0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Trained(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), training=self.training)


class Global(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * SCALES["now"]


class Branching(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.is_contiguous() else input


class Optional(nn.Linear):
    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(input) if scale is None else super().forward(input) * scale


class Helped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(signed(input))


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.randn(4)


class Writing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class Counting(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Weightless(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input * 2


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "linear": (lambda: nn.Linear(3, 4), lambda: (torch.randn(2, 3),)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, stride=2), lambda: (images(),)),
    "padded conv": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), lambda: (images(),)),
    "embedding": (lambda: nn.Embedding(5, 4), lambda: (torch.tensor([1, 4]),)),
    "embedding bag": (lambda: nn.EmbeddingBag(5, 4), lambda: (torch.tensor([1, 4, 2]), torch.tensor([0, 2]))),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "own class": (lambda: Doubled(3, 4), lambda: (torch.randn(2, 3),)),
    "own arithmetic": (lambda: Centred(3, 4), lambda: (torch.randn(2, 3),)),
}

INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), "the forward of MultiheadAttention runs modules of its own"),
    "lstm": (lambda: nn.LSTM(3, 4), "the forward of LSTM depends on the training flag"),
    "cell": (lambda: nn.RNNCell(3, 4), "the forward of RNNCell asks whether something is None"),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 4, 3),
        "the forward of ConvTranspose2d cannot be traced: TraceError",
    ),
    "attribute": (lambda: Attribute(3, 4), "the forward of Attribute reads the attribute scale, which may change"),
    "training": (lambda: Trained(3, 4), "the forward of Trained depends on the training flag"),
    "global": (lambda: Global(3, 4), "the forward of Global depends on SCALES, which may change"),
    "branch": (lambda: Branching(3, 4), "the forward of Branching branches or loops"),
    "none": (lambda: Optional(3, 4), "the forward of Optional asks whether something is None"),
    "branch of a function": (lambda: Helped(3, 4), "the forward of Helped cannot be traced: TraceError"),
    "constants": (lambda: Noisy(3, 4), "the forward of Noisy makes tensors that a trace keeps as constants"),
    "write": (lambda: Writing(3, 4), "the forward of Writing writes in place, by relu_"),
    "state": (lambda: Counting(3, 4), "the forward of Counting writes outside of its variables"),
    "unread": (lambda: Weightless(3, 4), "the forward of Weightless does not read weight itself"),
}


def names_in(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight"))


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_trace_computes_the_forward(name: str) -> None:
    module, inputs = EXACT[name][0](), EXACT[name][1]()
    graph = exact_trace(module, names_in(module))
    assert isinstance(graph, fx.Graph), graph
    assert torch.equal(fx.GraphModule(module, graph)(*inputs), module(*inputs))


@pytest.mark.parametrize("name", INEXACT)
def test_a_forward_that_a_trace_would_not_say_whole_has_its_reason(name: str) -> None:
    make, reason = INEXACT[name]
    module = make()
    assert exact_trace(module, names_in(module)) == reason


def test_a_trace_leaves_the_model_random_states_and_the_profiler_as_they_were() -> None:
    def profiler(*_: object) -> None:
        pass

    counting, noisy = Counting(3, 4), Noisy(3, 4)
    before, python = torch.get_rng_state(), random.getstate()
    sys.setprofile(profiler)
    try:
        exact_trace(counting, ("weight",))
        exact_trace(noisy, ("weight",))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert counting.calls == 0
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_garbage_collector_calls_meanwhile_is_no_part_of_the_forward() -> None:
    calls: list[str] = []

    def called(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            calls.append(phase)

    thresholds = gc.get_threshold()
    gc.callbacks.append(called)
    gc.set_threshold(1)
    try:
        traced = exact_trace(nn.Linear(2, 2), ("weight",))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(called)
    assert calls  # by the building of the layer
    assert isinstance(traced, fx.Graph)
