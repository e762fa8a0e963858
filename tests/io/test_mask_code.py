"""Coded masks: they come back as they were, are small, and are refused where they are not what was told."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapfx.io.mask_code import Gaps, decode, encode
from gapfx.masks import pack


@given(st.lists(st.booleans(), max_size=300))
def test_a_mask_comes_back(mask: list[bool]) -> None:
    bits = pack(torch.tensor(mask, dtype=torch.bool))
    assert torch.equal(decode(encode(bits, len(mask)), sum(mask), len(mask)), bits)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.05, 0.01, 0.001])
def test_a_random_mask_takes_little_more_than_its_entropy(share: float) -> None:
    numel = 200_000
    bits = pack(torch.rand(numel, generator=torch.Generator().manual_seed(0)) < share)
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert 8 * encode(bits, numel).num_bytes / numel < 1.06 * entropy + 0.001


def test_masks_of_nothing_and_of_all_come_back() -> None:
    for mask in (torch.zeros(100), torch.ones(100), torch.zeros(0)):
        bits = pack(mask.bool())
        assert torch.equal(decode(encode(bits, mask.numel()), int(mask.sum()), mask.numel()), bits)


CODE = encode(pack(torch.arange(1000) % 37 == 5), 1000)


@pytest.mark.parametrize(
    ("code", "live", "numel", "message"),
    [
        (CODE, 26, 1000, "low bits of 26 gaps"),
        (CODE, 27, 900, "a live weight is at"),
        (dataclasses.replace(CODE, low_bits=16), 27, 1000, "gaps have 16 low bits"),
        (dataclasses.replace(CODE, low_bits=-1), 27, 1000, "gaps have -1 low bits"),
        (dataclasses.replace(CODE, unary=CODE.unary[:-1]), 27, 1000, "27 were told"),
        (dataclasses.replace(CODE, unary=np.append(CODE.unary, np.uint8(0))), 27, 1000, "27 were told"),
        (dataclasses.replace(CODE, unary=np.full(4, 255, np.uint8)), 27, 1000, "32 live weights, 27 were told"),
        (Gaps(np.zeros(0, np.uint8), np.zeros(0, np.uint8), 0), 3, 1000, "0 live weights, 3 were told"),
    ],
)
def test_a_code_of_another_mask_is_refused(code: Gaps, live: int, numel: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(code, live, numel)
