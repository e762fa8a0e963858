"""The mask op: exact zeros, exact copies, gradients, and what torch's own tools say about it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gapfx.masks import pack
from gapfx.ops.mask import mask

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Masked(nn.Module):
    """A linear layer whose weight goes through the op."""

    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))
        self.register_buffer("bits", pack(torch.rand(5, 7) < 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ops.gapfx.mask(self.weight, self.bits).t()


def a_mask(*shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape) < share


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 2, 3, 3), (0, 3), ()])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torch_accepts_the_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(mask, (weight, pack(a_mask(*shape))))
    torch.library.opcheck(mask, (weight.detach(), pack(a_mask(*shape))))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("layout", ["transposed", "channels last", "strided"])
def test_torch_accepts_the_op_on_other_layouts(layout: str) -> None:
    weight = {
        "transposed": torch.randn(4, 6).t(),
        "channels last": torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 8)[::2, ::2],
    }[layout]
    kept = a_mask(*weight.shape)
    torch.library.opcheck(mask, (weight.requires_grad_(), pack(kept)))
    assert torch.equal(mask(weight, pack(kept)), weight * kept)
    assert mask(weight, pack(kept)).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_ones_changes_no_bit_of_output_and_gradient(dtype: torch.dtype) -> None:
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        torch.finfo(dtype).tiny,
        torch.finfo(dtype).smallest_normal / 2,
    ]
    weight = torch.cat([torch.tensor(special), torch.randn(6)]).to(dtype).requires_grad_()
    gradient = torch.randn(weight.shape).to(dtype)
    output = mask(weight, pack(torch.ones(weight.shape, dtype=torch.bool)))
    output.backward(gradient)
    assert bits(output) == bits(weight)
    assert weight.grad is not None
    assert bits(weight.grad) == bits(gradient)
    assert output.dtype == weight.grad.dtype == dtype


def bits(tensor: Tensor) -> list[int]:
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(size).tolist()


@pytest.mark.parametrize("value", [-0.0, math.inf, -math.inf, math.nan, -3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_places_are_plus_zero_whatever_was_there(value: float, dtype: torch.dtype) -> None:
    weight = torch.full((3, 3), value, dtype=dtype, requires_grad=True)
    output = mask(weight, pack(torch.zeros(3, 3, dtype=torch.bool)))
    output.backward(torch.full((3, 3), value, dtype=dtype))
    assert weight.grad is not None
    assert {*bits(output.flatten()), *bits(weight.grad.flatten())} == {0}


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_output_and_gradient_are_those_of_where(numel: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, kept, gradient = torch.randn(numel), a_mask(numel), torch.randn(numel)
    results: list[list[Tensor]] = []
    for function in (lambda w: mask(w, pack(kept)), lambda w: torch.where(kept, w, 0)):
        leaf = weight.clone().requires_grad_()
        output = function(leaf)
        output.backward(gradient)
        assert leaf.grad is not None
        results.append([output.detach(), leaf.grad])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_second_derivative_is_masked_too() -> None:
    weight, kept = torch.randn(6, dtype=torch.float64, requires_grad=True), pack(a_mask(6))
    assert torch.autograd.gradcheck(lambda w: mask(w, kept), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: mask(w, kept), (weight,))


def test_the_output_shares_no_memory_with_the_weight() -> None:
    weight = torch.randn(4)
    output = mask(weight, pack(torch.ones(4, dtype=torch.bool)))
    output.zero_()
    assert weight.count_nonzero() == 4


def test_only_the_bits_are_kept_for_the_gradient() -> None:
    saved: list[Tensor] = []
    weight, kept = torch.randn(64, requires_grad=True), pack(a_mask(64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mask(weight, kept)
    assert [tuple(tensor.shape) for tensor in saved] == [(8,)]


def test_an_export_holds_one_node_for_the_op_and_computes_the_same() -> None:
    module, x = Masked(), torch.randn(3, 7)
    program = torch.export.export(module, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("gapfx.mask.default") == 1
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_has_no_graph_break_and_computes_the_same() -> None:
    module, x = Masked(), torch.randn(3, 7)
    compiled = torch.compile(module, fullgraph=True)
    expected, output = module(x), compiled(x)
    torch.testing.assert_close(output, expected)
    expected_gradient = torch.autograd.grad(expected.square().sum(), module.weight)[0]
    output.square().sum().backward()
    torch.testing.assert_close(module.weight.grad, expected_gradient)
    module.bits.zero_()
    assert not compiled(x).any()
