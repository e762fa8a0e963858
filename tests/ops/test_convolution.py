"""Convolutions of all kinds with compact weights against the masked ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gapfx.ops.convolution import ConvSettings, convolution
from tests.ops.compact import DTYPES, a_weight, assert_bitwise, bytes_kept

STEPS = ((1, 0, 1), (2, 1, 1), (1, 2, 2))  # stride, padding, dilation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_it_equals_the_masked_convolution_to_the_bit(dtype: torch.dtype, dims: int, is_transposed: bool) -> None:
    torch.manual_seed(0)
    reference: Any = getattr(F, f"conv{'_transpose' if is_transposed else ''}{dims}d")
    for groups, (stride, padding, dilation), is_batched in itertools.product((1, 2), STEPS, (True, False)):
        shape = ((6, 4 // groups) if is_transposed else (4, 6 // groups)) + (3,) * dims
        weight = a_weight(*shape, dtype=dtype)
        sizes = [(number,) * dims for number in (stride, padding, dilation, 0)]
        settings = ConvSettings(sizes[0], sizes[1], sizes[2], sizes[3], groups, is_transposed)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_bitwise(
            weight,
            lambda v, x, b, weight=weight, settings=settings, shape=shape: convolution(
                x, v, weight.bits, b, shape, settings.to_ints()
            ),
            lambda w, x, b, options=options: reference(x, w, b, **options),
            torch.randn(*(2,) * is_batched, 6, *(9,) * dims).to(dtype),
            torch.randn(4).to(dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_stays_channels_last(dtype: torch.dtype) -> None:
    weight = a_weight(4, 6, 3, 3, dtype=dtype)
    settings = ConvSettings((1, 1), (1, 1), (1, 1), (0, 0))
    assert_bitwise(
        weight,
        lambda v, x: convolution(x, v, weight.bits, None, (4, 6, 3, 3), settings.to_ints()),
        lambda w, x: F.conv2d(x, w, padding=1),
        torch.randn(2, 6, 9, 9).to(dtype).to(memory_format=torch.channels_last),
    )


def test_autocast_computes_as_for_a_convolution() -> None:
    weight = a_weight(4, 3, 3, 3)
    settings = ConvSettings((1, 1), (0, 0), (1, 1), (0, 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(
            weight,
            lambda v, x, b: convolution(x, v, weight.bits, b, (4, 3, 3, 3), settings.to_ints()),
            lambda w, x, b: F.conv2d(x, w, b),
            torch.randn(2, 3, 5, 5),
            torch.randn(4),
        )


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_accepts_the_op(memory_format: torch.memory_format) -> None:
    weight = a_weight(4, 3, 3, 3)
    settings = ConvSettings((1, 1), (1, 1), (1, 1), (0, 0)).to_ints()
    x = torch.randn(2, 3, 5, 5).to(memory_format=memory_format).requires_grad_()
    given = (x, weight.values.requires_grad_(), weight.bits, torch.randn(4, requires_grad=True), [4, 3, 3, 3], settings)
    torch.library.opcheck(torch.ops.gapfx.convolution.default, given)


def test_settings_survive_as_numbers() -> None:
    settings = ConvSettings((2, 1, 3), (0, 1, 2), (1, 1, 2), (0, 0, 1), 4, True)
    assert ConvSettings.from_ints(settings.to_ints()) == ConvSettings(
        [2, 1, 3], [0, 1, 2], [1, 1, 2], [0, 0, 1], 4, True
    )


def test_no_dense_weight_is_kept_for_the_backward() -> None:
    weight = a_weight(32, 32, 3, 3, share=0.1)
    x, values, bits = torch.randn(1, 32, 4, 4), weight.values.requires_grad_(), weight.bits
    settings = ConvSettings((1, 1), (0, 0), (1, 1), (0, 0))
    kept = bytes_kept(lambda: convolution(x, values, bits, None, (32, 32, 3, 3), settings.to_ints()))
    assert kept == sum(t.untyped_storage().nbytes() for t in (x, values, bits))
