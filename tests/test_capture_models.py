"""Whatever a model does in its forward, the recording replays it bit for bit, or says what it leaves out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gapfx.capture import capture
from tests.kinds import Own
from tests.tasks.own_function import Layer
from tests.test_capture import check_equals_eager


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


def linear(width: int = 4) -> nn.Module:
    return nn.Linear(width, width)


def views(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    halves = y.view(2, 2, 2)
    halves[:, 0] += 1
    y.t()[1].mul_(3)
    y.narrow(1, 2, 2).copy_(x[:, :2])
    torch.relu_(y[0])
    with torch.no_grad():
        out = torch.empty_like(y)
        torch.add(y, 1, out=out)
    return out.masked_fill_(out > 2, 0.5).index_fill_(0, torch.tensor([1]), 2.0) + y


def randomness(m: Any, x: Tensor) -> Tensor:
    noise = torch.randn_like(x) * torch.rand(()) + torch.bernoulli(torch.full_like(x, 0.5))
    keep = torch.empty_like(x).uniform_() > 0.3
    return F.dropout(m.a(x + noise[torch.randperm(len(x))]), 0.3) * keep + F.gumbel_softmax(m.a(x))


def stochastic_depth(m: Any, x: Tensor) -> Tensor:
    return x + m.a(x) * x.new_empty(len(x), 1).bernoulli_(0.5).div_(0.5)


def keyword_inputs(m: Any, x: Tensor) -> Tensor:
    return m.inner(left=x, options={"right": x * 2, "scale": 3})


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, *, left: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        return {"sum": self.a(left) + options["right"] * options["scale"]}


def keyword_children() -> nn.Module:
    names = ("class", "self", "torch", "0", "recompile", "lambda", "meta")
    model = Own(lambda m, x: sum((m.get_submodule(name)(x) for name in names), x))
    for name in names:
        model.add_module(name, linear())
    return model


def same_twice() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 4)
    return x, x


def norms() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None), nn.InstanceNorm1d(3))


# name -> (model, inputs)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "views and writes in place": (lambda: Own(views, a=linear()), lambda: (torch.randn(2, 4),)),
    "random numbers": (lambda: Own(randomness, a=linear()), lambda: (torch.randn(3, 4),)),
    "random depth": (lambda: Own(stochastic_depth, a=linear()), lambda: (torch.randn(3, 4),)),
    "batch norms": (
        norms,
        lambda: (torch.randn(4, 2, 5),),
    ),
    "a Function with a gradient of its own": (lambda: Layer(4), lambda: (torch.randn(2, 4),)),
    "checkpoint, re-entrant": (
        lambda: Own(
            lambda m, x: checkpoint(m.a, x * 2, use_reentrant=True), a=nn.Sequential(linear(), nn.Dropout(0.2))
        ),
        lambda: (torch.randn(2, 4, requires_grad=True),),
    ),
    "checkpoint, not re-entrant": (
        lambda: Own(lambda m, x: checkpoint(m.a, x, use_reentrant=False), a=nn.Sequential(linear(), nn.Dropout(0.2))),
        lambda: (torch.randn(2, 4),),
    ),
    "one module under two names": (
        lambda: (lambda shared: Own(lambda m, x: m.b(torch.relu(m.a(x))), a=shared, b=shared))(linear()),
        lambda: (torch.randn(2, 4),),
    ),
    "a module called three times in a loop": (
        lambda: Own(lambda m, x: m.a(m.a(m.a(x))), a=nn.Sequential(linear(), nn.GELU())),
        lambda: (torch.randn(2, 4),),
    ),
    "children named as keywords": (
        keyword_children,
        lambda: (torch.randn(2, 4),),
    ),
    "a child with keyword and dict inputs": (lambda: Own(keyword_inputs, inner=Inner()), lambda: (torch.randn(2, 4),)),
    "inputs in structures": (
        lambda: Own(lambda m, a, b: m.a(a.left + a.right[0]) + b["x"]["y"], a=linear()),
        lambda: (Pair(torch.randn(2, 4), [torch.randn(2, 4)]), {"x": {"y": torch.randn(2, 4)}, "n": 3}),
    ),
    "an optional input that is absent": (
        lambda: Own(lambda m, x, mask: m.a(x) if mask is None else x, a=linear()),
        lambda: (torch.randn(2, 4), None),
    ),
    "the same tensor twice": (
        lambda: Own(lambda m, a, b: m.a(a) * b, a=linear()),
        lambda: (lambda x: (x, x))(torch.randn(2, 4)),
    ),
    "returns a dataclass": (
        lambda: Own(lambda m, x: Result(m.a(x), (x * 2, m.a(x * 2))), a=linear()),
        lambda: (torch.randn(2, 4),),
    ),
    "returns nested structures": (
        lambda: Own(lambda m, x: OrderedDict(a=[Pair(m.a(x), None), "text"], b=(x * 2, 3)), a=linear()),
        lambda: (torch.randn(2, 4),),
    ),
    "chooses by value": (
        lambda: Own(lambda m, x: m.a(x) if x.sum() > 1e9 else m.a(x[x[:, 0].abs() >= 0]), a=linear()),
        lambda: (torch.randn(2, 4),),
    ),
    "detach, no_grad and data": (
        lambda: Own(lambda m, x: m.a(x) + m.a(x).detach() + m.a(x).data * 2 + _frozen(m, x), a=linear()),
        lambda: (torch.randn(2, 4),),
    ),
    "einsum, fft, sort, where, scatter": (
        lambda: Own(
            lambda m, x: (
                torch.where(x > 0, torch.einsum("bi,bj->bj", m.a(x), x), torch.fft.fft(x).real).sort(-1)[0]
                + torch.zeros(2, 4).scatter(1, x.argsort(1), m.a(x))
            ),
            a=linear(),
        ),
        lambda: (torch.randn(2, 4),),
    ),
}


def _frozen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_does_replays_bit_for_bit(name: str) -> None:
    build, inputs = MODELS[name]
    check_equals_eager(build(), *inputs())


def test_shared_modules_keep_one_name_and_count_their_calls() -> None:
    build, inputs = MODELS["one module under two names"]
    recorded = check_equals_eager(build(), *inputs())
    assert [(use.user, use.node) for use in recorded.uses if use.role == "gemm"] == [("a", "a"), ("a", "a_call2")]
    assert recorded.parameters["a.weight"].aliases == ("b.weight",)


@pytest.mark.parametrize("kind", ["re-entrant", "not re-entrant"])
def test_weights_under_a_checkpoint_are_found_with_their_module(kind: str) -> None:
    build, inputs = MODELS[f"checkpoint, {kind}"]
    recorded = check_equals_eager(build(), *inputs())
    assert [(use.fqn, use.user) for use in recorded.uses if use.role == "gemm"] == [("a.0.weight", "a.0")]


def test_buffers_that_a_forward_replaces_are_put_back_by_identity() -> None:
    class Scale(nn.Module):
        """I-BERT assigns new tensors to its buffers in each training step."""

        low: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("low", torch.zeros(1))
            self.register_buffer("steps", None)

        def forward(self, x: Tensor) -> Tensor:
            self.low = torch.min(self.low, x.detach().min())
            self.steps = torch.ones(1)
            return self.a(x) * self.low

    model = Scale()
    low = model.low
    recorded = capture(model, lambda module: module(torch.randn(2, 4)))
    assert model.low is low
    assert float(low) == 0
    assert dict(vars(model)["_buffers"])["steps"] is None
    assert recorded.parameters["a.weight"].role == "gemm"


def test_a_script_module_is_one_node_with_the_uses_inside() -> None:
    body = cast(nn.Module, torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    recorded = check_equals_eager(nn.Sequential(nn.Linear(4, 4), body, nn.Linear(4, 4)), torch.randn(2, 4))
    nodes = [(node.op, node.name) for node in recorded.graph_module.graph.nodes]
    assert nodes[1:4] == [("call_module", "_0"), ("call_module", "_1"), ("call_module", "_2")]
    assert [use.node for use in recorded.uses if use.role == "gemm"] == ["_0", "_1", "_2"]


def test_each_data_dependent_call_is_marked_with_its_module() -> None:
    marks: dict[str, Callable[[Tensor], object]] = {
        "item": lambda x: x.sum().item(),
        "tolist": lambda x: x.tolist(),
        "numpy": lambda x: x.detach().numpy(),
        "bool": lambda x: bool(x.sum() > 0),
        "int": lambda x: int(x.sum()),
        "float": lambda x: float(x.sum()),
        "index": lambda x: [1, 2, 3][x.argmax() * 0],
        "nonzero": lambda x: x.nonzero(),
        "unique": lambda x: x.unique(),
        "masked_select": lambda x: x.masked_select(x > 0),
        "getitem": lambda x: x[x > 0],
        "contains": lambda x: 3.0 in x,
    }

    def call(m: Any, x: Tensor) -> Tensor:
        for mark in marks.values():
            mark(x)
        return m.a(x)

    model = nn.Sequential(Own(call, a=linear()))
    [note] = capture(model, lambda module: module(torch.randn(2, 4))).notes
    assert note.startswith("0: the path depends on values (")
    assert all(mark in note for mark in marks)
