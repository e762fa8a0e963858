"""A linear layer that reads live values alone against densify and multiply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import linear as kernels
from gapfx.masks import pack
from gapfx.ops.linear import linear
from gapfx.ops.preparation import preparation_seconds
from gapfx.ops.sparse_linear import refusal, sparse_linear
from tests.kernels.needs import needs_kernels
from tests.ops.compact import Weight, a_weight, bytes_kept, run

pytestmark = needs_kernels
SHAPES = ((4, 32), (2, 16, 32), (32,), (0, 32), (1, 32), (3, 1, 32))


def dense_in_fp64(weight: Weight, x: Tensor, *bias: Tensor) -> list[Tensor]:
    """Output and gradients of x, live values and bias."""

    def layer(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        return F.linear(x, w * weight.mask, *bias)

    output, of_x, of_weight, *of_bias = run(layer, x.double(), weight.dense.double(), *(b.double() for b in bias))
    return [output, of_x, of_weight[weight.mask].view(-1, 1), *of_bias]


def ours(weight: Weight, x: Tensor, *bias: Tensor, op: Callable[..., Tensor] = sparse_linear) -> list[Tensor]:
    bits, shape = weight.bits, tuple(weight.dense.shape)
    return run(lambda x, v, *b: op(x, v, bits, b[0] if b else None, shape), x, weight.values, *bias)


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * max(1.0, _largest(other)))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_equals_the_masked_layer(share: float, shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = a_weight(24, 32, share=share), [torch.randn(24)] * has_bias
    x = torch.randn(shape)
    found = ours(weight, x, *bias)
    assert_close(found, dense_in_fp64(weight, x, *bias))
    assert [t.stride() for t in found] == [t.stride() for t in ours(weight, x, *bias, op=linear)]


@pytest.mark.parametrize("has_bias", [True, False])
def test_bf16_is_rounded_once(has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = a_weight(24, 32, dtype=torch.bfloat16), [torch.randn(24).bfloat16()] * has_bias
    x = torch.randn(70, 32).bfloat16()
    found = ours(weight, x, *bias)
    assert {t.dtype for t in found} == {torch.bfloat16}
    output = dense_in_fp64(weight, x, *bias)[0]
    assert bool(((found[0].double() - output).abs() <= output.abs() * 2**-8 + 1e-5).all())
    # The gradient that comes in is twice the output, which is rounded.
    assert_close(found, dense_in_fp64(weight, x, *bias), 2e-2)


def test_columns_of_a_tensor_and_rows_apart_are_inputs_as_well() -> None:
    torch.manual_seed(0)
    weight = a_weight(24, 32)
    for x in (torch.randn(32, 70).t(), torch.randn(140, 32)[::2], torch.randn(1, 32).expand(70, 32)):
        assert_close(ours(weight, x.contiguous()), dense_in_fp64(weight, x))
        assert torch.equal(
            sparse_linear(x, weight.values, weight.bits, None, (24, 32)),
            sparse_linear(x.contiguous(), weight.values, weight.bits, None, (24, 32)),
        )


def test_a_dropped_weight_takes_part_in_nothing() -> None:
    weight = Weight(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[True, False], [False, True]]))
    x = torch.tensor([[torch.inf, 1.0], [torch.nan, 3.0]])
    y = sparse_linear(x, weight.values, weight.bits, None, (2, 2))
    torch.testing.assert_close(y, torch.tensor([[torch.inf, 2.0], [torch.nan, 6.0]]), equal_nan=True)


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_by_the_dense_product(dtype: torch.dtype, share: float) -> None:
    weight, x = a_weight(8, 16, dtype=dtype, share=share), torch.randn(4, 16).to(dtype)
    for one, other in zip(ours(weight, x), ours(weight, x, op=linear), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_masked_values_and_all_live_ones_are_computed_by_the_dense_product(share: float) -> None:
    weight, x = a_weight(8, 16, share=share), torch.randn(4, 16)
    values, bits = weight.dense if share < 1 else weight.values, weight.bits
    found = run(lambda x, v: sparse_linear(x, v, bits, None, (8, 16)), x, values)
    for one, other in zip(found, run(lambda x, v: linear(x, v, bits, None, (8, 16)), x, values), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_taken_says_why() -> None:
    assert refusal((768, 768), torch.float32) == ""
    assert refusal((768, 768), torch.bfloat16) == ""
    assert refusal((70000, 768), torch.float32) == "more than 65536 inputs or outputs"
    assert refusal((1 << 16, 1 << 15), torch.float32) == "the weight has 2^31 elements or more"
    assert refusal((4, 4, 3, 3), torch.float32) == "a weight of 4 dimensions"
    assert refusal((768, 768), torch.float16) == "float16: the kernels compute in fp32 and bf16"


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    weight, x = a_weight(24, 32), torch.randn(4, 32)
    with pytest.raises(RuntimeError, match="bias should have 24 elements, it has 3"):
        sparse_linear(x, weight.values, weight.bits, torch.zeros(3), (24, 32))
    with pytest.raises(RuntimeError, match="values should have"):
        sparse_linear(x, weight.values[1:], weight.bits, None, (24, 32))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torch_accepts_the_op() -> None:
    weight = a_weight(5, 4)
    given = (torch.randn(3, 4, requires_grad=True), weight.values.requires_grad_(), weight.bits)
    op: Any = torch.ops.gapfx.sparse_linear.default
    torch.library.opcheck(op, (*given, torch.randn(5, requires_grad=True), [5, 4]))
    torch.library.opcheck(op, (*given, None, [5, 4]))


def test_only_input_values_and_bits_are_kept_for_the_backward() -> None:
    weight = a_weight(64, 64, share=0.1)
    x, values, bits = torch.randn(2, 64), weight.values.requires_grad_(), weight.bits
    kept = bytes_kept(lambda: sparse_linear(x, values, bits, None, (64, 64)))
    assert kept == sum(t.untyped_storage().nbytes() for t in (x, values, bits))


@pytest.mark.parametrize("has_bias", [True, False])
def test_autocast_computes_as_for_a_linear_layer(has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = a_weight(8, 16), [torch.randn(8)] * has_bias
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(weight, x, *bias), ours(weight, x, *bias, op=linear)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert_close(found, [t.double() for t in wanted], 2e-2)


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    weight, x = a_weight(8, 16), torch.randn(4, 16)
    bits, values = weight.bits, weight.values.requires_grad_()
    sparse_linear(x, values, bits, None, (8, 16)).sum().backward()
    assert values.grad is not None
    fixed, given = weight.values, x.clone().requires_grad_()
    sparse_linear(given, fixed, bits, None, (8, 16)).sum().backward()
    assert given.grad is not None
    assert fixed.grad is None


def test_it_compiles_in_one_graph() -> None:
    weight, x = a_weight(8, 16), torch.randn(4, 16)
    bits = weight.bits

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, values, bits, None, (8, 16)).relu()

    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for one, other in zip(run(compiled, x, weight.values), run(layer, x, weight.values), strict=True):
        assert torch.equal(one, other)


def test_a_mask_is_prepared_once_and_again_when_it_is_written_in_place() -> None:
    torch.manual_seed(0)
    one, other = a_weight(24, 32), a_weight(24, 32)
    bits, x = one.bits, torch.randn(4, 32)
    first = kernels.index_of(bits, (24, 32))
    assert kernels.index_of(bits.detach(), (24, 32)) is first
    bits.copy_(other.bits)
    assert_close([sparse_linear(x, other.values, bits, None, (24, 32))], [x.double() @ other.dense.double().t()])
    assert kernels.index_of(bits, (24, 32)) is not first


def test_a_mask_of_inference_mode_may_be_written_in_place() -> None:
    torch.manual_seed(0)
    one, other, x = a_weight(24, 32), a_weight(24, 32), torch.randn(4, 32)
    with torch.inference_mode():
        bits = one.bits.clone()
        sparse_linear(x, one.values, bits, None, (24, 32))
        bits.copy_(other.bits)
        y = sparse_linear(x, other.values, bits, None, (24, 32))
    assert_close([y], [x.double() @ other.dense.double().t()])


def test_a_copy_of_a_mask_is_a_mask_of_its_own() -> None:
    weight, x = a_weight(24, 32), torch.randn(4, 32)
    bits = weight.bits
    y = sparse_linear(x, weight.values, bits, None, (24, 32))
    copied = copy.deepcopy(bits)
    bits.zero_()
    assert torch.equal(sparse_linear(x, weight.values, copied, None, (24, 32)), y)


def test_preparation_is_timed_until_it_is_reset() -> None:
    preparation_seconds(reset=True)
    bits = pack(torch.rand(64, 64) < 0.5)
    kernels.index_of(bits, (64, 64))
    spent = preparation_seconds(reset=True)
    assert spent > 0
    kernels.index_of(bits, (64, 64))
    assert preparation_seconds() == 0
