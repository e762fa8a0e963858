"""Packing, counting and comparing masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gapfx.masks import MASK_PREFIX, bits_of, count_kept, digest, num_bytes, pack, split_fqn, stored_parameter, unpack
from gapfx.masks import write_bits as write

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    numel = math.prod(shape)
    flat = draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    return torch.tensor(flat, dtype=torch.bool).view(shape)


@given(masks())
def test_unpack_undoes_pack(mask: Tensor) -> None:
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (num_bytes(mask.numel()),)
    back = unpack(bits, mask.shape)
    assert back.dtype == torch.bool
    assert back.shape == mask.shape
    assert torch.equal(back, mask)


@given(masks())
def test_bits_lie_least_significant_first_and_spare_bits_are_zero(mask: Tensor) -> None:
    flat = mask.flatten().tolist()
    expected = [sum(flat[at + i] << i for i in range(min(8, len(flat) - at))) for at in range(0, len(flat), 8)]
    assert pack(mask).tolist() == expected


@given(masks())
def test_the_count_is_that_of_true_values(mask: Tensor) -> None:
    assert count_kept(pack(mask)) == int(mask.sum())


def test_a_mask_that_is_not_contiguous_is_packed_in_the_order_of_its_indices() -> None:
    mask = torch.rand(6, 5).lt(0.5).t()
    assert torch.equal(unpack(pack(mask), (5, 6)), mask)


def test_the_digest_sees_every_bit_and_name() -> None:
    first, second = pack(torch.ones(9, dtype=torch.bool)), pack(torch.zeros(9, dtype=torch.bool))
    flipped = second.clone()
    flipped[1] ^= 1
    sets = ([first, second], [second, first], [first, flipped], [first])
    assert len({digest(zip("ab", masks, strict=False)) for masks in sets}) == 4
    assert digest([("a", first), ("c", second)]) != digest([("a", first), ("b", second)])


def test_no_two_sets_of_masks_are_the_same_stream_of_bytes() -> None:
    one = {"a": torch.tensor([98, 0, 1], dtype=torch.uint8)}
    two = {"a": torch.tensor([], dtype=torch.uint8), "b": torch.tensor([1], dtype=torch.uint8)}
    assert digest(one.items()) != digest(two.items())


@given(st.dictionaries(st.text(max_size=3), masks(), max_size=3), st.dictionaries(st.text(max_size=3), masks()))
def test_digests_are_equal_exactly_when_all_bits_are(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    packed = [{fqn: pack(mask) for fqn, mask in item.items()} for item in (first, second)]
    plain = [{fqn: bits.tolist() for fqn, bits in item.items()} for item in packed]
    assert (digest(sorted(packed[0].items())) == digest(sorted(packed[1].items()))) == (plain[0] == plain[1])


@pytest.mark.parametrize(
    ("fqn", "parts"), [("weight", ("", "weight")), ("a.weight", ("a", "weight")), ("a.0.b.w", ("a.0.b", "w"))]
)
def test_an_fqn_splits_into_owner_and_name(fqn: str, parts: tuple[str, str]) -> None:
    assert split_fqn(fqn) == parts


def test_bits_are_written_in_place_and_found_by_fqn() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    module[0].register_buffer(MASK_PREFIX + "weight", torch.zeros(1, dtype=torch.uint8), persistent=False)
    buffer = bits_of(module, "0.weight")
    write(module, "0.weight", torch.tensor([37], dtype=torch.uint8))
    assert bits_of(module, "0.weight") is buffer
    assert buffer.tolist() == [37]
    assert stored_parameter(module, "0.weight") is module[0].weight
    with pytest.raises(AttributeError, match="_gapfx_mask_bias"):
        bits_of(module, "0.bias")
