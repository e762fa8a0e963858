"""Products of our own are called in two ways, which do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gapfx.ops import convolution, linear, sparse_convolution, sparse_linear
from gapfx.ops.product import is_unseen
from tests.ops.compact import a_weight

SETTINGS = convolution.ConvSettings((1, 1), (1, 1), (1, 1), (0, 0)).to_ints()
LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "linear": (linear.linear, (24, 32), (6, 32), ()),
    "sparse_linear": (sparse_linear.sparse_linear, (24, 32), (6, 32), ()),
    "convolution": (convolution.convolution, (8, 4, 3, 3), (2, 4, 6, 6), (SETTINGS,)),
    "sparse_convolution": (sparse_convolution.sparse_convolution, (8, 4, 3, 3), (2, 4, 6, 6), (SETTINGS,)),
}


class Watch(TorchDispatchMode):
    """Somebody who looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _results(name: str, share: float, *, has_bias: bool = True) -> list[Tensor]:
    """Output and gradients of one layer, its input and weight drawn anew from one seed."""
    torch.manual_seed(1)
    layer, shape, size, others = LAYERS[name]
    weight = a_weight(*shape, share=share)
    bias = torch.randn(shape[0]).requires_grad_() if has_bias else None
    x, values = torch.randn(size).requires_grad_(), weight.values.clone().requires_grad_()
    out = layer(x, values, weight.bits, bias, shape, *others)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in (x, values, bias) if leaf is not None and leaf.grad is not None)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_both_ways_end_in_the_same_bits(name: str, share: float, has_bias: bool) -> None:
    direct = _results(name, share, has_bias=has_bias)
    with Watch() as watch:
        seen = _results(name, share, has_bias=has_bias)
    assert f"gapfx.{name}.default" in watch.seen
    assert f"gapfx.{name}_backward.default" in watch.seen
    assert len(direct) == len(seen) == 3 + has_bias
    assert all(torch.equal(one, other) for one, other in zip(direct, seen, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_operands_get_no_gradient(name: str) -> None:
    layer, shape, size, others = LAYERS[name]
    weight, x = a_weight(*shape, share=0.25), torch.randn(size)
    values = weight.values.clone().requires_grad_()
    layer(x, values, weight.bits, torch.zeros(shape[0]), shape, *others).sum().backward()
    assert x.grad is None
    assert values.grad is not None
    assert not layer(x, weight.values, weight.bits, None, shape, *others).requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_derivative_is_refused(name: str) -> None:
    layer, shape, size, others = LAYERS[name]
    weight, x = a_weight(*shape, share=0.25), torch.randn(size).requires_grad_()
    (of_x,) = torch.autograd.grad(
        layer(x, weight.values, weight.bits, None, shape, *others).pow(2).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_x.sum().backward()


def test_whoever_looks_on_sees_an_op() -> None:
    x = torch.randn(2, 3)
    assert is_unseen(x)
    assert not is_unseen(torch.nn.Parameter(x))
    assert not is_unseen(x.to("meta"))
    with Watch():
        assert not is_unseen(x)
    found: list[bool] = []
    torch.func.vmap(lambda row: found.append(is_unseen(row)) or row)(x)  # pyright: ignore[reportUnknownMemberType]
    assert found == [False]
    compiled = torch.compile(lambda row: row + is_unseen(row), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)
