"""The op around sparse convolutions: what it takes, keeps, refuses, and how torch sees it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import convolution as kernels
from gapfx.masks import pack
from gapfx.ops.convolution import ConvSettings, convolution
from gapfx.ops.preparation import preparation_seconds
from gapfx.ops.sparse_convolution import refusal, sparse_convolution
from gapfx.ops.sparse_linear import sparse_linear
from tests.kernels.needs import needs_kernels
from tests.ops.compact import a_weight, bytes_kept
from tests.ops.convolutions import gradients, settings_of

pytestmark = needs_kernels


def test_unbatched_inputs_are_batches_of_one() -> None:
    torch.manual_seed(0)
    weight = a_weight(4, 3, 3, 3)
    x, settings = torch.randn(3, 6, 6), settings_of(weight).to_ints()
    one, batch = (
        sparse_convolution(given, weight.values, weight.bits, None, weight.dense.shape, settings)
        for given in (x, x[None])
    )
    assert torch.equal(one, batch[0])


def test_bits_that_change_in_place_are_prepared_again() -> None:
    torch.manual_seed(0)
    first, second = a_weight(4, 3, 3, 3), a_weight(4, 3, 3, 3)
    bits, x, settings = first.bits, torch.randn(1, 3, 6, 6), settings_of(first).to_ints()
    sparse_convolution(x, first.values, bits, None, (4, 3, 3, 3), settings)
    kept = kernels.prepare(bits, (4, 3, 3, 3), 1)
    assert kernels.prepare(bits, (4, 3, 3, 3), 1) is kept
    bits.copy_(second.bits)
    y = sparse_convolution(x, second.values, bits, None, (4, 3, 3, 3), settings)
    torch.testing.assert_close(y, F.conv2d(x, second.dense))
    with torch.inference_mode():
        torch.testing.assert_close(
            sparse_convolution(x, first.values, first.bits.clone(), None, (4, 3, 3, 3), settings),
            F.conv2d(x, first.dense),
        )


def test_preparation_counts_with_that_of_linear_layers_until_it_is_reset() -> None:
    preparation_seconds(reset=True)
    weight = a_weight(16, 8, 3, 3)
    x, bits, settings = torch.randn(1, 8, 6, 6), weight.bits, settings_of(weight).to_ints()
    sparse_convolution(x, weight.values, bits, None, (16, 8, 3, 3), settings)
    of_convolution = preparation_seconds()
    assert of_convolution > 0
    sparse_convolution(x, weight.values, bits, None, (16, 8, 3, 3), settings)
    assert preparation_seconds() == of_convolution
    linear = a_weight(24, 32)
    sparse_linear(torch.randn(4, 32), linear.values, linear.bits, None, (24, 32))
    assert preparation_seconds(reset=True) > of_convolution
    assert preparation_seconds() == 0


def test_a_weight_that_is_all_live_or_masked_goes_the_dense_way() -> None:
    torch.manual_seed(0)
    weight = a_weight(4, 3, 3, 3)
    x, settings, shape = torch.randn(2, 3, 6, 6), settings_of(weight).to_ints(), [4, 3, 3, 3]
    ones = pack(torch.ones(shape, dtype=torch.bool))
    for values, bits in ((weight.dense, weight.bits), (torch.randn(108, 1), ones)):
        found = []
        for op in (convolution, sparse_convolution):
            leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
            found.append(gradients(op(leaves[0], leaves[1], bits, None, shape, settings), leaves))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_autocast_computes_as_for_a_convolution() -> None:
    torch.manual_seed(0)
    weight = a_weight(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_convolution(
            torch.randn(2, 3, 5, 5),
            weight.values,
            weight.bits,
            torch.randn(4),
            [4, 3, 3, 3],
            settings_of(weight).to_ints(),
        )
    assert y.dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_accepts_the_op(memory_format: torch.memory_format) -> None:
    weight = a_weight(4, 3, 3, 3)
    x = torch.randn(2, 3, 5, 5).to(memory_format=memory_format).requires_grad_()
    settings = settings_of(weight, padding=1).to_ints()
    given = (x, weight.values.requires_grad_(), weight.bits, torch.randn(4, requires_grad=True), [4, 3, 3, 3], settings)
    torch.library.opcheck(torch.ops.gapfx.sparse_convolution.default, given)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_one_compiled_graph_takes_it() -> None:
    torch.manual_seed(0)
    weight = a_weight(4, 3, 3, 3)
    bits, shape, settings = weight.bits, [4, 3, 3, 3], settings_of(weight, padding=1).to_ints()

    def run(x: Tensor, values: Tensor) -> Tensor:
        return sparse_convolution(x, values, bits, None, shape, settings).relu()

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [torch.arange(150.0).view(2, 3, 5, 5).sin().requires_grad_(), weight.values.requires_grad_()]
        found.append(gradients(function(*leaves), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_has_no_kernel_is_refused_with_the_reason() -> None:
    transposed = ConvSettings((1,), (0,), (1,), (0,), 1, True).to_ints()
    plain = ConvSettings((1,), (0,), (1,), (0,)).to_ints()
    assert refusal((4, 3, 3), plain, torch.float32) == ""
    assert "transposed" in refusal((4, 3, 3), transposed, torch.float32)
    assert "not float64" in refusal((4, 3, 3), plain, torch.float64)
    assert "2^31" in refusal((1 << 16, 1 << 15, 1), plain, torch.bfloat16)
    assert "more than 65536 taps" in refusal((2, 1, 70000), plain, torch.float32)
    assert "6 dimensions" in refusal((1,) * 6, plain, torch.float32)
    weight = a_weight(4, 3, 3)
    with pytest.raises(RuntimeError, match="not float64"):
        sparse_convolution(torch.randn(1, 3, 5).double(), weight.values.double(), weight.bits, None, (4, 3, 3), plain)


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    weight, x = a_weight(4, 3, 3, 3), torch.randn(1, 3, 6, 6)
    bits, settings = weight.bits, settings_of(weight).to_ints()

    def convolve(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_convolution(x, values, bits, bias, (4, 3, 3, 3), settings)

    with pytest.raises(RuntimeError, match="2 channels, not 3"):
        convolve(x[:, :2], weight.values, torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"kernel \[3, 3\] is larger than the padded input"):
        convolve(x[..., :2], weight.values, torch.zeros(4))
    with pytest.raises(RuntimeError, match="bias should have 4 elements, it has 3"):
        convolve(x, weight.values, torch.zeros(3))
    with pytest.raises(RuntimeError, match="values should have"):
        convolve(x, weight.values[1:], torch.zeros(4))


def test_nothing_but_input_values_and_bits_is_kept_for_the_backward() -> None:
    weight = a_weight(32, 32, 3, 3, share=0.1)
    x, values, bits = torch.randn(1, 32, 4, 4), weight.values.requires_grad_(), weight.bits
    settings = settings_of(weight).to_ints()
    kept = bytes_kept(lambda: sparse_convolution(x, values, bits, None, (32, 32, 3, 3), settings))
    assert kept == sum(t.untyped_storage().nbytes() for t in (x, values, bits))
