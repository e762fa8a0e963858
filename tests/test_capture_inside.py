"""Weights whose use Python does not show: found by the ops that run inside Functions, transforms and ScriptModules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from gapfx.capture import Capture, capture


def recorded(model: nn.Module, *inputs: Tensor) -> Capture:
    return capture(model, lambda module: module(*inputs))


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def traced(module: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cast(nn.Module, torch.jit.trace(module, x, check_trace=False))


class OwnProduct(torch.autograd.Function):
    """Takes the owner of its weight, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: nn.Linear) -> Tensor:
        ctx.save_for_backward(x, owner.weight)
        return x @ owner.weight.t().data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.saved_tensors[1], None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(x, x, w)


class Quantise(torch.autograd.Function):
    """Gives a weight back that is used outside."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.round(w * 8) / 8


class Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w - w.mean()


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() @ w.detach().numpy())


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * w


class Calls(nn.Module):
    """Linear `inner` and parameter `w` [4, 4], used by a function."""

    def __init__(self, call: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.w, self.call = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self)


# call -> parameter, its role, the function that takes it or the reason why it is none
INSIDE: dict[str, tuple[Callable[[Tensor, Any], Tensor], str, str, str]] = {
    "a weight of a module that is an argument": (
        lambda x, m: OwnProduct.apply(x, m.inner),
        "inner.weight",
        "gemm",
        "mm",
    ),
    "a weight that is an argument": (lambda x, m: Product.apply(x, m.w), "w", "gemm", "addmm"),
    "a view of a weight": (lambda x, m: Product.apply(x, m.w.t()[:, [1, 0, 2, 3]]), "w", "gemm", "addmm"),
    "through a quantiser": (lambda x, m: x @ Quantise.apply(m.w), "w", "gemm", "matmul"),
    "through a quantiser and a Function": (lambda x, m: Product.apply(x, Quantise.apply(m.w)), "w", "gemm", "addmm"),
    "around a mapped function": (lambda x, m: vmap(lambda row: row @ m.w)(x), "w", "gemm", "mm"),
    "mapped over": (lambda x, m: vmap(lambda row: x @ row)(m.w), "w", "gemm", "mm"),
    "in a gradient": (lambda x, m: grad(lambda y: (y @ m.w).sum())(x), "w", "gemm", "mm"),
    "in mapped gradients": (lambda x, m: vmap(grad(lambda y: (y @ m.w).sum()))(x), "w", "gemm", "mm"),
    "a scale": (
        lambda x, m: Scaled.apply(x, m.w),
        "w",
        "other",
        "multiplied with activations element by element by mul: a scale",
    ),
    "where zeros do not stay": (
        lambda x, m: x @ Centre.apply(m.w),
        "w",
        "other",
        "taken by sub, and what that gives does not meet an activation",
    ),
    "code that leaves torch": (
        lambda x, m: Numpy.apply(x, m.w) + m.inner(x),
        "w",
        "other",
        "read inside Numpy, where no op that takes it can be seen",
    ),
}


@pytest.mark.parametrize("case", INSIDE)
def test_role_of_a_weight_inside_a_call(case: str) -> None:
    call, fqn, role, what = INSIDE[case]
    found = recorded(Calls(call), torch.randn(4, 4))
    assert found.parameters[fqn].role == role
    assert what in {use.fn if role == "gemm" else use.reason for use in found.uses if use.fqn == fqn}


def test_the_use_is_in_the_recorded_graph_and_noted() -> None:
    found = recorded(Calls(INSIDE["a weight of a module that is an argument"][0]), torch.randn(4, 4))
    use = next(use for use in found.uses if use.fqn == "inner.weight")
    node = next(node for node in found.graph_module.graph.nodes if node.name == use.node)
    assert node.meta["fn"] == "OwnProduct"
    assert found.notes == (
        "the root: the autograd Function OwnProduct uses inner.weight as an operand of mm, seen by the ops below it",
    )


def test_an_ensemble_by_functional_calls_is_seen_through() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts: list[nn.Module] = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(3)]
            stacked, _ = stack_module_state(parts)
            self.stacked = nn.ParameterDict({name.replace(".", "_"): value for name, value in stacked.items()})
            self.one = (parts[0],)

        def forward(self, x: Tensor) -> Tensor:
            named = {name.replace("_", "."): value for name, value in self.stacked.items()}
            return vmap(lambda params: functional_call(self.one[0], params, (x,)))(named)

    found = recorded(Ensemble(), torch.randn(5, 4))
    roles = {fqn: parameter.role for fqn, parameter in found.parameters.items()}
    assert roles["stacked.0_weight"] == roles["stacked.2_weight"] == "gemm"
    assert roles["stacked.0_bias"] == "other"


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.norm = nn.Linear(4, 8), nn.Conv1d(8, 8, 1), nn.LayerNorm([3, 8])
        self.rnn, self.w, self.places = nn.LSTM(8, 4), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.c(self.a(x).transpose(1, 2)).transpose(1, 2))
        return (self.rnn(y)[0] + self.places) @ self.w


@pytest.mark.parametrize("make", [scripted, lambda module: traced(module, torch.randn(2, 3, 4))])
@pytest.mark.parametrize("num_runs", [0, 3])
def test_weights_of_a_script_module_are_told_apart(make: Callable[[nn.Module], nn.Module], num_runs: int) -> None:
    module, x = make(Scriptable()), torch.randn(2, 3, 4)
    for _ in range(num_runs):  # from the third run on TorchScript runs an optimised graph
        module(x)
    found = recorded(nn.Sequential(module), x)
    roles = {fqn.removeprefix("0."): item.role for fqn, item in found.parameters.items() if len(item.shape) > 1}
    assert roles == {
        "w": "gemm",
        "places": "other",
        "unused": "unused",
        "a.weight": "gemm",
        "c.weight": "gemm",
        "norm.weight": "other",
        "norm.bias": "other",
        "rnn.weight_ih_l0": "gemm",
        "rnn.weight_hh_l0": "gemm",
    }


def test_an_input_of_a_script_module_can_be_a_weight() -> None:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.add = nn.Parameter(torch.randn(4, 4)), scripted(Multiply())

        def forward(self, x: Tensor) -> Tensor:
            return self.add(x, self.w)

    assert recorded(Hands(), torch.randn(2, 4)).parameters["w"].role == "gemm"


class Multiply(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w
