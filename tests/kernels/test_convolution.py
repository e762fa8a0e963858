"""Native sparse convolutions against torch's dense ones in float64, at every level of instructions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from gapfx.kernels import convolution as kernels
from gapfx.ops.convolution import ConvSettings
from tests.kernels.needs import needs_kernels
from tests.ops.compact import Weight, a_weight
from tests.ops.convolutions import check, ours, settings_of

pytestmark = needs_kernels


def small_settings() -> Iterator[tuple[int, int, int, int]]:
    return itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
def test_it_equals_the_dense_convolution_in_all_small_settings(kernel: int) -> None:
    torch.manual_seed(0)
    for (stride, padding, dilation, groups), side in itertools.product(small_settings(), (7, 14)):
        if side + 2 * padding <= dilation * (kernel - 1):
            continue
        weight = a_weight(6, 4 // groups, kernel, kernel, share=0.3)
        x = torch.randn(2, 4, side, side + 3)
        check(weight, x, settings_of(weight, stride, padding, dilation, groups))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [(5, 3, 3), (5, 3, 1, 4), (5, 3, 4, 1), (4, 3, 2, 3, 2), (4, 3, 1, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_and_three_dimensions_and_kernels_that_are_not_square(shape: tuple[int, ...], stride: int) -> None:
    torch.manual_seed(0)
    weight = a_weight(*shape)
    check(weight, torch.randn(3, 3, *(6, 7, 9)[: len(shape) - 2]), settings_of(weight, stride, padding=1))


@pytest.mark.usefixtures("level")
def test_each_dimension_has_settings_of_its_own() -> None:
    torch.manual_seed(0)
    weight = a_weight(4, 6, 3, 2)
    check(weight, torch.randn(2, 12, 11, 8), ConvSettings((2, 3), (0, 2), (2, 1), (0, 0), 2))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("side", [1, 2, 5, 8, 15, 16, 33, 70])
def test_panels_of_lanes_end_anywhere_and_span_images(side: int) -> None:
    torch.manual_seed(side)
    weight = a_weight(9, 3, 3, 3)
    for batch in (1, 2, 5):
        check(weight, torch.randn(batch, 3, side, side), settings_of(weight, padding=1))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.95])
def test_many_tiles_of_columns(share: float) -> None:
    torch.manual_seed(0)
    weight = a_weight(24, 130, 3, 3, share=share)
    assert kernels.prepare(weight.bits, weight.dense.shape, 1).tiles >= 4
    check(weight, torch.randn(2, 130, 6, 7), settings_of(weight, padding=1))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("rows", [4, 8])
def test_blocks_of_four_outputs_share_their_columns(rows: int) -> None:
    torch.manual_seed(0)
    for side, groups in itertools.product((3, 5, 9), (1, 2)):
        mask = (torch.rand(16 // rows, 10, 3, 3) < 0.3).repeat_interleave(rows, 0)
        weight = Weight(torch.randn(mask.shape) * mask, mask)
        assert kernels.prepare(weight.bits, mask.shape, groups).is_blocked
        check(weight, torch.randn(2, 10 * groups, side, side), settings_of(weight, padding=1, groups=groups))


@pytest.mark.usefixtures("level")
def test_rows_without_live_weights_give_the_bias_and_one_live_weight_is_enough() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(7, 3, 3, 3, dtype=torch.bool)
    mask[4, 1, 2, 0] = True
    weight = Weight(torch.randn(mask.shape) * mask, mask)
    check(weight, torch.randn(2, 3, 6, 6), settings_of(weight, padding=1))


@pytest.mark.usefixtures("level")
def test_a_batch_of_no_images_has_gradients_of_zero() -> None:
    weight = a_weight(4, 3, 3, 3)
    y, of_x, of_values, of_bias = ours(weight, torch.randn(0, 3, 6, 6), torch.randn(4), settings_of(weight))
    assert y.shape == (0, 4, 4, 4)
    assert of_x.shape == (0, 3, 6, 6)
    assert not of_values.any()
    assert not of_bias.any()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last_and_strided_inputs(stride: int) -> None:
    torch.manual_seed(0)
    weight = a_weight(5, 6, 3, 3)
    settings = settings_of(weight, stride, padding=1)
    last = torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    for x in (last, torch.randn(2, 9, 8, 6).permute(0, 3, 1, 2)[:, :, ::2], torch.randn(1, 6, 9, 8).expand(3, 6, 9, 8)):
        check(weight, x, settings)
    y, of_x = ours(weight, last, torch.randn(5), settings)[:2]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("level")
def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    for stride, padding in ((1, 0), (1, 1), (2, 1)):
        weight = a_weight(8, 20, 3, 3, dtype=torch.bfloat16)
        check(weight, torch.randn(2, 20, 9, 9).bfloat16(), settings_of(weight, stride, padding), 2**-8)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_work_and_change_no_bit(threads: int) -> None:
    torch.manual_seed(0)
    weight, bias = a_weight(20, 30, 3, 3), torch.randn(20)
    for batch, side, stride in ((1, 5, 1), (1, 6, 2), (3, 17, 1)):
        x, settings = torch.randn(batch, 30, side, side), settings_of(weight, stride, padding=1)
        alone = ours(weight, x, bias, settings)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            together = ours(weight, x, bias, settings)
        finally:
            torch.set_num_threads(before)
        for one, other in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(one, other)
