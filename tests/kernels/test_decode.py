"""Products of few tokens with a fixed sparse weight against torch, at every level of instructions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import decode, native
from gapfx.masks import pack
from tests.kernels.needs import needs_kernels

pytestmark = needs_kernels
SHAPES = ((1, 1), (5, 7), (37, 130), (64, 64), (131, 256))
SHARES = (0.0, 0.1, 0.5, 1.0)
TOKENS = (1, 2, 3, 7, 8, 9, 15)
WAYS = (1, 5, 16)  # by columns; by columns from five tokens on; by masks
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
Case = tuple[Tensor, Tensor]


def a_mask(shape: tuple[int, int], share: float) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    mask[0, 0] = True
    return mask


def has_masked(dtype: torch.dtype) -> bool:
    return bool(native.needed().gapfx_decode_has_masked(decode.TYPES[dtype]))


def cases() -> list[tuple[Tensor, int]]:
    return [(a_mask(shape, share), way) for shape, share, way in itertools.product(SHAPES, SHARES, WAYS)]


def assert_close(found: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    """Within rounding of the sum of magnitudes."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= ROUNDING[found.dtype] * (magnitude + 1)).all()


def check(layout: decode.DecodeLayout, dense: Tensor, dtype: torch.dtype, tokens: int) -> None:
    x, bias = torch.randn(tokens, dense.shape[1]).to(dtype), torch.randn(dense.shape[0]).to(dtype)
    found = decode.product(x, layout, bias)
    assert found.dtype == dtype
    wanted = F.linear(x.double(), dense.double(), bias.double())
    assert_close(found, wanted, F.linear(x.double().abs(), dense.double().abs(), bias.double().abs()))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dense_weight(dtype: torch.dtype, values: torch.dtype) -> None:
    torch.manual_seed(0)
    for mask, way in cases():
        dense = (torch.randn(mask.shape) * mask).to(values)
        layout = decode.prepare(dense[mask], mask, pack(mask), by_number_from=way)
        for tokens in TOKENS:
            check(layout, dense, dtype, tokens)


@pytest.mark.usefixtures("level")
def test_int8_values_are_summed_exactly() -> None:
    torch.manual_seed(0)
    for mask, way in cases():
        whole = torch.randint(-127, 128, mask.shape) * mask
        live = whole[mask].to(torch.int8)
        layout = decode.prepare(live, mask, pack(mask), scales=torch.ones(len(mask)), by_number_from=way)
        for tokens in TOKENS:
            x = torch.randint(-127, 128, (tokens, mask.shape[1]))
            x[:, 0] = 127  # so that a unit of the rounded token is 1
            assert torch.equal(decode.product(x.float(), layout, None), (x @ whole.t()).float())


@pytest.mark.usefixtures("level")
def test_int8_values_are_summed_exactly_beyond_what_fp32_can_hold() -> None:
    mask = torch.ones(1, 5000, dtype=torch.bool)
    live = torch.full((5000,), 127, dtype=torch.int8)
    live[-1] = 1
    for way in WAYS:
        layout = decode.prepare(live, mask, pack(mask), scales=torch.tensor([1 / 128]), by_number_from=way)
        for tokens in TOKENS:
            found = decode.product(torch.full((tokens, 5000), 127.0), layout, None)
            assert torch.equal(found, torch.full((tokens, 1), (4999 * 127 * 127 + 127) / 128))


@pytest.mark.parametrize("dtype", list(decode.TYPES))
def test_columns_are_taken_where_no_kernel_goes_by_masks(dtype: torch.dtype, level: str) -> None:
    mask = a_mask((8, 64), 0.6)
    layout = decode.prepare(torch.ones(int(mask.sum()), dtype=dtype), mask, pack(mask), scales=torch.ones(8))
    by_columns = layout.words is None and layout.columns is not None and layout.by_number_from == 1
    assert by_columns == (level != "avx512" or not has_masked(dtype))


@pytest.mark.usefixtures("level")
def test_int8_rounds_each_token_to_127_levels_a_sign() -> None:
    torch.manual_seed(0)
    mask = a_mask((24, 100), 0.3)
    dense = torch.randn(mask.shape) * mask
    live, scales = decode.quantised(dense[mask], mask)
    held = torch.zeros_like(dense).masked_scatter_(mask, live.float()) * scales[:, None]
    assert ((held - dense).abs() <= scales[:, None] / 2 * 1.001).all()
    layout = decode.prepare(live, mask, pack(mask), scales=scales)
    x = torch.randn(3, 100)
    x[1] = 0
    limit = (x.abs().amax(1, keepdim=True) / 254 * 1.001) @ held.abs().sum(1)[None] + 1e-4
    assert ((decode.product(x, layout, None) - x @ held.t()).abs() <= limit).all()


@pytest.mark.usefixtures("level")
def test_every_level_and_thread_gives_an_empty_row_its_bias() -> None:
    mask = torch.zeros(200, 70, dtype=torch.bool)
    mask[17, 3] = True
    for way in WAYS:
        layout = decode.prepare(torch.tensor([2.0]), mask, pack(mask), by_number_from=way)
        found = decode.product(torch.ones(2, 70), layout, torch.arange(200.0))
        wanted = torch.arange(200.0) + 2 * mask.any(1)
        assert torch.equal(found, wanted.expand(2, -1))


@pytest.mark.usefixtures("level")
def test_threads_split_rows_and_change_no_bit() -> None:
    torch.manual_seed(0)
    mask = a_mask((515, 512), 0.4)
    layouts = [decode.prepare(torch.randn(int(mask.sum())), mask, pack(mask), by_number_from=way) for way in WAYS]
    x, threads = torch.randn(3, 512), torch.get_num_threads()
    try:
        for layout in layouts:
            torch.set_num_threads(1)
            alone = decode.product(x, layout, None)
            torch.set_num_threads(3)
            # Far rows meet in other turns, but each is summed as before.
            assert torch.equal(decode.product(x, layout, None), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("level")
def test_nan_and_infinity_reach_outputs_through_live_weights() -> None:
    mask = a_mask((8, 64), 0.3)
    mask[:, 5] = True
    live, x = torch.rand(int(mask.sum())) + 0.5, torch.ones(2, 64)
    for values, way in itertools.product((torch.float32, torch.bfloat16), WAYS):
        layout = decode.prepare(live.to(values), mask, pack(mask), by_number_from=way)
        x[1, 5] = torch.nan
        found = decode.product(x, layout, None)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
        x[1, 5] = torch.inf
        assert not decode.product(x, layout, None)[1].isfinite().any()
    small, scales = decode.quantised(live, mask)
    layout = decode.prepare(small, mask, pack(mask), scales=scales)
    assert decode.product(x, layout, None)[1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_int8_that_was_not_finite_is_nan(bad: float) -> None:
    mask = torch.tensor([[True, True], [True, False]])
    live, scales = decode.quantised(torch.tensor([1.0, bad, 2.0]), mask)
    y = decode.product(torch.ones(1, 2), decode.prepare(live, mask, pack(mask), scales=scales), None)
    assert bool(y[0, 0].isnan())
    assert float(y[0, 1]) == pytest.approx(2)


def test_inputs_need_not_be_contiguous() -> None:
    mask = a_mask((16, 64), 0.3)
    layout = decode.prepare(torch.randn(int(mask.sum())), mask, pack(mask))
    x = torch.randn(64, 4)
    assert torch.equal(decode.product(x.t(), layout, None), decode.product(x.t().contiguous(), layout, None))


def test_values_with_room_behind_them_are_not_copied() -> None:
    mask = a_mask((16, 64), 0.3)
    live = decode.with_spare(torch.randn(int(mask.sum())))
    assert decode.prepare(live, mask, pack(mask)).values.data_ptr() == live.data_ptr()


def test_too_many_tokens_are_refused() -> None:
    mask = a_mask((4, 4), 1.0)
    layout = decode.prepare(torch.randn(16), mask, pack(mask))
    with pytest.raises(ValueError, match="16 tokens: the kernels take 1 to 15"):
        decode.product(torch.randn(16, 4), layout, None)


def test_what_the_kernels_cannot_take_is_refused_with_a_reason() -> None:
    assert decode.refusal((4, 4), torch.float32) == ""
    assert decode.refusal((4, 4), torch.float64) == "float64: values are fp32, bf16 or int8"
    assert decode.refusal((4, 4, 4), torch.float32) == "a weight of shape [4, 4, 4]"
    assert decode.refusal((4, 70_000), torch.float32) == "more than 65536 inputs"
