"""A state in slices: nothing is lost or doubled, and the whole comes back to the bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gapfx.masks import pack
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import Spread, TrainState, column, dense_slice, live_slice, own_part, whole, whole_bits
from tests.runtime.threads import at, on_ranks


@given(st.integers(0, 300), st.integers(1, 9), st.sampled_from([8, 16, 24, 40]))
def test_slices_tile_a_weight_at_granules(numel: int, size: int, granule: int) -> None:
    bounds = [Spread((numel,), granule).bounds(rank, size) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert all(start % granule == 0 or start == numel for start, _ in bounds)
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) <= -(-numel // size) + granule


def state_of(shape: tuple[int, ...], kept: float) -> tuple[TrainState, Tensor]:
    """A state of one rank, and its dense weight."""
    mask = torch.rand(shape) < kept
    dense = torch.where(mask, torch.randn(shape), 0.0)
    special = torch.tensor([-0.0, math.nan, math.inf])
    dense.view(-1)[: min(3, dense.numel())] = special[: min(3, dense.numel())]
    mask.view(-1)[:3] = True
    bits = pack(mask)
    state = TrainState({"w": Spread(shape)}, {"w": live_slice(dense.flatten(), bits)})
    state.put_bits("w", bits)
    return state, dense


def bits_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kept", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7, 9), (16, 8), (3, 2, 5)])
def test_the_whole_comes_back_from_slices_to_the_bit(shape: tuple[int, ...], kept: float, size: int) -> None:
    state, dense = state_of(shape, kept)
    live = state.weights["w"]

    def check(peers: Peers) -> int:
        mine = at(peers, state)
        start, stop = mine.bounds("w")
        assert bits_equal(dense_slice(mine, mine.weights, "w"), dense.flatten()[start:stop])
        assert bits_equal(column(mine, mine.weights, "w"), live)
        assert bits_equal(whole(mine, mine.weights, "w"), dense)
        assert bits_equal(own_part(mine, "w", live), mine.weights["w"])
        assert torch.equal(whole_bits(mine, "w"), state.bits["w"])
        return mine.weights["w"].numel()

    assert sum(on_ranks(size, check)) == live.numel() == state.num_live("w")


def test_a_parameter_without_a_mask_is_cut_too() -> None:
    value = torch.randn(20)
    state = TrainState({"bias": Spread((20,))}, {"bias": value})

    def check(peers: Peers) -> list[float]:
        mine = at(peers, state)
        assert "bias" not in mine.bits
        assert bits_equal(whole(mine, mine.weights, "bias"), value)
        return mine.weights["bias"].tolist()

    first, second = on_ranks(2, check)
    assert first + second == value.tolist()
