"""The highest scores of slices are those of the whole, whatever the number of ranks, the type, and ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gapfx.pattern import top_mask
from gapfx.runtime.ranks import Peers
from gapfx.runtime.select import top_of_slices
from tests.runtime.threads import on_ranks

SCORES = {
    "normal": lambda n: torch.randn(n),
    "with ties": lambda n: torch.randn(n).mul(3).round(),
    "all equal": lambda n: torch.ones(n),
    "signed zeros": lambda n: torch.where(torch.rand(n) < 0.5, -0.0, 0.0),
    "infinite": lambda n: torch.randn(n).div(torch.randint(0, 2, (n,))).nan_to_num(0, float("inf"), -float("inf")),
    "tiny": lambda n: torch.randn(n) * 1e-42,
    "double": lambda n: torch.randn(n, dtype=torch.float64),
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
    "permutation": lambda n: torch.randperm(n),
    "small integers": lambda n: torch.randint(-4, 4, (n,), dtype=torch.int8),
    "large integers": lambda n: torch.randint(-(2**62), 2**62, (n,)),
}


def of_slices(score: Tensor, num_kept: int, cuts: list[int]) -> Tensor:
    bounds = [0, *sorted(cuts), score.numel()]

    def mine(peers: Peers) -> Tensor:
        return top_of_slices(score[bounds[peers.rank] : bounds[peers.rank + 1]], num_kept, peers)

    return torch.cat(on_ranks(len(bounds) - 1, mine))


@pytest.mark.parametrize("kind", SCORES)
@given(data=st.data())
def test_slices_select_what_the_whole_would(kind: str, data: st.DataObject) -> None:
    numel = data.draw(st.integers(1, 200))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    score = SCORES[kind](numel)
    num_kept = data.draw(st.integers(1, numel))
    cuts = data.draw(st.lists(st.integers(0, numel), min_size=1, max_size=3))
    assert torch.equal(of_slices(score, num_kept, cuts), top_mask(score, num_kept))


def test_one_rank_selects_as_ever() -> None:
    score = torch.randn(4, 5)
    assert torch.equal(top_of_slices(score, 7, Peers()), top_mask(score, 7))


def test_the_selection_draws_nothing_and_leaves_the_scores_alone() -> None:
    score, before = torch.randn(64), torch.get_rng_state()
    kept = score.clone()
    of_slices(score, 9, [20])
    assert torch.equal(score, kept)
    assert torch.equal(torch.get_rng_state(), before)
