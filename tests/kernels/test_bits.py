"""Native expand and gather against torch: every size around a word, every instruction set, and every bit of a value."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gapfx.kernels import native
from gapfx.masks import num_bytes, pack
from tests.kernels.needs import needs_kernels

pytestmark = needs_kernels
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
MANY = 200_003  # several threads
SHARES = (0, 0.1, 0.5, 0.99, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SENTINEL = 7.0


def a_case(size: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=generator) < share
    return mask, torch.randn(size, generator=generator).to(dtype)


def beyond(size: int, dtype: torch.dtype) -> Tensor:
    """Room for `size` values, and eight more that nobody may write."""
    return torch.full((size + 8,), SENTINEL, dtype=dtype)


def check(size: int, share: float, dtype: torch.dtype) -> None:
    mask, dense = a_case(size, share, dtype)
    num = int(mask.sum())
    values, expanded = beyond(num, dtype), beyond(size, dtype)
    native.gather(dense, pack(mask), values[:num])
    native.expand(values[:num], pack(mask), expanded[:size])
    assert torch.equal(values[:num], dense[mask])
    assert torch.equal(expanded[:size], torch.where(mask, dense, 0))
    assert bool((values[num:] == SENTINEL).all())
    assert bool((expanded[size:] == SENTINEL).all())
    assert native.count(pack(mask), size) == num


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_go_where_their_bits_are_and_nowhere_else(dtype: torch.dtype) -> None:
    for size, share in itertools.product(SIZES, SHARES):
        check(size, share, dtype)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_threads_give_the_same(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for share in SHARES:
            check(MANY, share, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("level")
def test_every_bit_of_a_value_arrives() -> None:
    words = torch.tensor([0x7FC00001, -0x00400000, 0x7F800000, -0x80000000, 1, 0x7F800001], dtype=torch.int32)
    special = words.view(torch.float32).repeat(20)
    mask = torch.rand(120, generator=torch.Generator().manual_seed(0)) < 0.5
    values, dense = torch.empty(int(mask.sum())), torch.empty(120)
    native.gather(special, pack(mask), values)
    native.expand(values, pack(mask), dense)
    assert torch.equal(values.view(torch.int32), special[mask].view(torch.int32))
    assert torch.equal(dense.view(torch.int32), torch.where(mask, special.view(torch.int32), 0))


@pytest.mark.usefixtures("level")
def test_spare_bits_of_the_last_byte_are_no_weights() -> None:
    bits = torch.tensor([255], dtype=torch.uint8)
    values = beyond(3, torch.float32)
    native.gather(torch.arange(3.0), bits, values[:3])
    assert values.tolist() == [0, 1, 2] + [SENTINEL] * 8
    assert native.count(bits, 3) == 3


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("size", [*SIZES, 0, (1 << 20) + 77])
def test_masks_are_packed_and_unpacked_as_torch_does(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = a_case(size, 0.5, torch.float32)[0]
    room = torch.full((size + 8,), True)
    bits = torch.full((num_bytes(size) + 8,), 255, dtype=torch.uint8)
    native.pack(mask, bits[: num_bytes(size)])
    native.unpack(bits[: num_bytes(size)], room[:size])
    monkeypatch.setattr(native, "can_pack", lambda tensor: False)
    assert torch.equal(bits[: num_bytes(size)], pack(mask))
    assert torch.equal(room[:size], mask)
    assert bool(room[size:].all())
    assert bits[num_bytes(size) :].tolist() == [255] * 8


@pytest.mark.usefixtures("level")
def test_any_byte_but_0_is_true() -> None:
    mask = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    bits = torch.empty(32, dtype=torch.uint8)
    native.pack(mask, bits)
    assert bits.tolist() == [254] + [255] * 31


def test_bits_for_another_number_of_weights_are_refused() -> None:
    with pytest.raises(RuntimeError, match="the bits of a mask should have 2 elements, it has 1"):
        native.unpack(torch.zeros(1, dtype=torch.uint8), torch.zeros(9, dtype=torch.bool))


def test_values_of_one_byte_are_refused() -> None:
    with pytest.raises(TypeError, match="2, 4 or 8 bytes"):
        native.expand(
            torch.ones(1, dtype=torch.int8), torch.ones(1, dtype=torch.uint8), torch.ones(8, dtype=torch.int8)
        )
