"""A linear layer with a compact weight against the masked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.ops.linear import linear
from tests.ops.compact import DTYPES, a_weight, assert_bitwise, bytes_kept, run

SHAPES = ((4, 32), (2, 16, 32), (32,), (0, 32), (1, 32), (3, 1, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_equals_the_masked_layer_to_the_bit(
    dtype: torch.dtype, share: float, shape: tuple[int, ...], has_bias: bool
) -> None:
    torch.manual_seed(0)
    weight = a_weight(24, 32, dtype=dtype, share=share)
    bias = [torch.randn(24).to(dtype)] * has_bias
    assert_bitwise(
        weight,
        lambda values, x, *b: linear(x, values, weight.bits, b[0] if b else None, (24, 32)),
        lambda dense, x, *b: F.linear(x, dense, *b),
        torch.randn(shape).to(dtype),
        *bias,
    )


def test_gradients_are_right() -> None:
    weight = a_weight(5, 4, dtype=torch.float64)
    x, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight.values.clone(), bias)]
    assert torch.autograd.gradcheck(lambda x, v, b: linear(x, v, weight.bits, b, (5, 4)), inputs)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torch_accepts_the_op() -> None:
    weight = a_weight(5, 4)
    given = (torch.randn(3, 4, requires_grad=True), weight.values.requires_grad_(), weight.bits)
    torch.library.opcheck(torch.ops.gapfx.linear.default, (*given, torch.randn(5, requires_grad=True), [5, 4]))
    torch.library.opcheck(torch.ops.gapfx.linear.default, (*given, None, [5, 4]))


def test_only_input_values_and_bits_are_kept_for_the_backward() -> None:
    weight = a_weight(64, 64, share=0.1)
    x, values, bits = torch.randn(2, 64), weight.values.requires_grad_(), weight.bits
    kept = bytes_kept(lambda: linear(x, values, bits, None, (64, 64)))
    assert kept == sum(t.untyped_storage().nbytes() for t in (x, values, bits))
    assert kept < 64 * 64 * 4


@pytest.mark.parametrize("has_bias", [True, False])
def test_autocast_computes_as_for_a_linear_layer(has_bias: bool) -> None:
    weight = a_weight(8, 16)
    bias = [torch.randn(8)] * has_bias
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(
            weight,
            lambda values, x, *b: linear(x, values, weight.bits, b[0] if b else None, (8, 16)),
            lambda dense, x, *b: F.linear(x, dense, *b),
            torch.randn(4, 16),
            *bias,
        )


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    weight = a_weight(8, 16)
    x = torch.randn(4, 16)
    values = weight.values.requires_grad_()
    linear(x, values, weight.bits, None, (8, 16)).sum().backward()
    assert values.grad is not None
    fixed = weight.values
    given = x.clone().requires_grad_()
    linear(given, fixed, weight.bits, None, (8, 16)).sum().backward()
    assert given.grad is not None
    assert fixed.grad is None


def test_it_compiles_in_one_graph() -> None:
    weight = a_weight(8, 16)
    bits = weight.bits
    x = torch.randn(4, 16)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return linear(x, values, bits, None, (8, 16)).relu()

    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for one, other in zip(run(compiled, x, weight.values), run(layer, x, weight.values), strict=True):
        assert torch.equal(one, other)
