"""Evaluations end for all ranks at once, whatever each of them does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from gapfx.runtime.evaluation import evaluated
from gapfx.runtime.ranks import Peers
from tests.runtime.threads import on_ranks


def course(num_batches: list[int], stops_at: tuple[int, int] | None) -> list[tuple[dict[str, float] | None, int]]:
    """What each rank gets, and how many batches it took, when one rank wants to stop before one of its batches."""

    def of(peers: Peers) -> tuple[dict[str, float] | None, int]:
        taken = [0]

        def evaluate(module: nn.Module, before_batch: Callable[[], object]) -> dict[str, float]:
            for _ in range(num_batches[peers.rank]):
                before_batch()
                taken[0] += 1
            return {"rank": peers.rank}

        found = evaluated(evaluate, nn.Identity(), peers, lambda: (peers.rank, taken[0]) == stops_at)
        return found, taken[0]

    return on_ranks(len(num_batches), of)


def test_ranks_that_take_unequal_numbers_of_batches_all_come_to_the_end() -> None:
    assert course([0, 5, 2], None) == [({"rank": 0}, 0), ({"rank": 1}, 5), ({"rank": 2}, 2)]


def test_a_stop_reaches_every_rank_at_the_same_batch_also_those_that_are_done() -> None:
    assert course([9, 9, 1], (1, 4)) == [(None, 4), (None, 4), (None, 1)]
    assert course([3, 1], (1, 1)) == [(None, 1), (None, 1)]


def test_a_task_that_swallows_the_stop_has_no_metrics() -> None:
    def evaluate(module: nn.Module, before_batch: Callable[[], object]) -> dict[str, float]:
        try:
            before_batch()
        except Exception:
            return {"made": 1.0}
        raise AssertionError("it went on")

    assert evaluated(evaluate, nn.Identity(), Peers(), lambda: True) is None


def test_what_fails_in_an_evaluation_is_told() -> None:
    def evaluate(module: nn.Module, before_batch: Callable[[], object]) -> dict[str, float]:
        before_batch()
        raise ValueError("a token out of range")

    with pytest.raises(ValueError, match="a token out of range"):
        evaluated(evaluate, nn.Identity(), Peers(), lambda: False)
