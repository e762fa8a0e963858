"""A linear layer at inference with a compact weight, by the number of tokens, against the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gapfx.kernels.decode import quantised
from gapfx.ops.fixed_linear import dense_weight, fixed_linear, layout_of, with_scales
from tests.kernels.needs import needs_kernels
from tests.ops.compact import a_weight

SHAPES = ((0, 40), (40,), (1, 40), (3, 5, 40), (2, 8, 40), (65, 40))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
def test_it_equals_the_dense_layer_for_any_number_of_tokens(shape: tuple[int, ...], share: float, values: str) -> None:
    torch.manual_seed(0)
    weight, bias, x = a_weight(24, 40, share=share), torch.randn(24), torch.randn(shape)
    held = weight.values.bfloat16() if values == "bf16" else weight.values
    if values == "int8":
        held = with_scales(*quantised(weight.values, weight.mask))
    dense = dense_weight(held, weight.bits, (24, 40), torch.float32)
    found = fixed_linear(x, held, weight.bits, bias, (24, 40))
    # Tokens are read in 24, 16 and 8 bits; the sums of fp32 round too.
    relative = {"fp32": 2**-20, "bf16": 2**-15, "int8": 1 / 50}[values]
    limit = relative * (F.linear(x.abs().amax(-1, keepdim=True).expand(shape), dense.abs(), bias.abs()) + 1)
    assert found.shape == limit.shape
    assert ((found - F.linear(x, dense, bias)).abs() <= limit).all()


def test_it_is_one_op_for_whoever_looks_on() -> None:
    weight, x = a_weight(24, 40), torch.randn(3, 40)
    values, bits = weight.values, weight.bits
    traced = torch.fx.experimental.proxy_tensor.make_fx(  # pyright: ignore
        lambda given: fixed_linear(given, values, bits, None, (24, 40))
    )(x)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == ["gapfx.fixed_linear.default"]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torch_accepts_the_op() -> None:
    weight = a_weight(24, 40)
    for tokens in (3, 20):
        given = (torch.randn(tokens, 40), weight.values, weight.bits, torch.randn(24), [24, 40])
        torch.library.opcheck(torch.ops.gapfx.fixed_linear.default, given)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_trace_holds_the_op() -> None:
    weight, x = a_weight(24, 40), torch.randn(3, 40)
    values, bits = weight.values, weight.bits
    traced: Any = torch.jit.trace(lambda given: fixed_linear(given, values, bits, None, (24, 40)), (x,))
    assert torch.equal(traced(x + 1), fixed_linear(x + 1, values, bits, None, (24, 40)))


@pytest.mark.parametrize("trained", ["input", "values", "bias"])
def test_a_gradient_is_refused(trained: str) -> None:
    weight = a_weight(24, 40)
    x, values, bias = torch.randn(3, 40), weight.values, torch.randn(24)
    {"input": x, "values": values, "bias": bias}[trained].requires_grad_()
    found = fixed_linear(x, values, weight.bits, bias, (24, 40))
    with pytest.raises(RuntimeError, match="autograd"):
        found.sum().backward()


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_bias_may_lie_apart_in_memory(tokens: int) -> None:
    torch.manual_seed(0)
    weight, x, bias = a_weight(24, 40), torch.randn(tokens, 40), torch.randn(24, 2)[:, 0]
    found = fixed_linear(x, weight.values, weight.bits, bias, (24, 40))
    torch.testing.assert_close(found, F.linear(x, weight.dense, bias), rtol=0, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("tokens", [3, 20])
def test_what_does_not_fit_is_refused_before_it_is_read(tokens: int) -> None:
    weight, x = a_weight(24, 40), torch.randn(tokens, 40)
    with pytest.raises(RuntimeError, match="bias should have 24 elements, it has 3"):
        fixed_linear(x, weight.values, weight.bits, torch.zeros(3), (24, 40))
    with pytest.raises(RuntimeError, match="values should have"):
        fixed_linear(x, weight.values[1:], weight.bits, None, (24, 40))


def test_other_values_at_the_address_of_freed_ones_are_read() -> None:
    torch.manual_seed(0)
    weight, x = a_weight(24, 40), torch.randn(3, 40)
    bits = weight.bits
    for factor in range(20):
        found = fixed_linear(x, weight.values * factor, bits, None, (24, 40))
        torch.testing.assert_close(found, F.linear(x, weight.dense * factor), rtol=0, atol=1e-4)


def test_bits_that_move_to_shared_memory_are_read_there() -> None:
    weight, x = a_weight(256, 512), torch.randn(3, 512)
    values, bits = weight.values, weight.bits
    fixed_linear(x, values, bits, None, (256, 512))
    bits.share_memory_()
    taken = [torch.full((bits.numel(),), 255, dtype=torch.uint8) for _ in range(8)]  # where the bits were
    found = fixed_linear(x, values, bits, None, (256, 512))
    torch.testing.assert_close(found, F.linear(x, weight.dense), rtol=0, atol=1e-4)
    del taken


def test_tensors_of_inference_mode_may_be_written_in_place() -> None:
    torch.manual_seed(0)
    first, second, x = a_weight(24, 40), a_weight(24, 40), torch.randn(3, 40)
    with torch.inference_mode():
        bits, values = first.bits.clone(), first.values.clone()
        fixed_linear(x, values, bits, None, (24, 40))
        values.mul_(2)
        torch.testing.assert_close(fixed_linear(x, values, bits, None, (24, 40)), F.linear(x, first.dense * 2))
        bits.copy_(second.bits)
        torch.testing.assert_close(fixed_linear(x, second.values, bits, None, (24, 40)), F.linear(x, second.dense))


@needs_kernels
def test_what_is_prepared_is_kept_until_bits_or_values_change() -> None:
    weight, shape = a_weight(24, 40), (24, 40)
    values, bits = weight.values, weight.bits
    kept = layout_of(values, bits, shape)
    assert layout_of(values, bits, shape) is kept
    values += 1
    assert layout_of(values, bits, shape) is not kept
    kept = layout_of(values, bits, shape)
    bits.copy_(bits.clone())
    assert layout_of(values, bits, shape) is not kept
