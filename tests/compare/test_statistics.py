"""Means, spreads and paired differences on numbers whose answers are known."""

from __future__ import annotations

import pytest

from gapfx.compare.statistics import Spread, paired


def test_mean_and_sample_deviation() -> None:
    assert Spread((1.0, 2.0, 3.0)).mean == 2
    assert Spread((1.0, 2.0, 3.0)).deviation == 1
    assert Spread((5.0,)).deviation is None


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [
        ((2.0, 3.0, 4.0), (1.0, 2.0, 3.0), 2 / 8),  # all in one direction: only that and its mirror are as large
        ((2.0,), (1.0,), 1.0),
        ((1.0, 3.0), (2.0, 2.0), 1.0),
        ((1.0, 2.0), (1.0, 2.0), 1.0),
        ((3.0, 1.5, 2.0, 2.0, 2.0), (1.0, 2.0, 1.0, 1.0, 1.0), 4 / 32),
    ],
)
def test_p_counts_the_signs_that_chance_could_have_given(ours: tuple[float], theirs: tuple[float], p: float) -> None:
    found = paired(ours, theirs)
    assert found.p == p
    assert found.num_pairs == len(ours)
    assert found.mean == pytest.approx(sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(ours))


def test_of_many_pairs_signs_are_drawn() -> None:
    ours, theirs = [1.0 + 0.1 * i for i in range(40)], [0.5] * 40
    assert paired(ours, theirs).p == 1 / 2**16  # what was seen alone
    wavering = [(-1.0) ** i for i in range(40)]
    assert paired(wavering, [0.0] * 40).p == 1
    assert paired([0.3, *wavering], [0.0] * 41) == paired([0.3, *wavering], [0.0] * 41)


def test_the_order_of_the_two_changes_the_sign_alone() -> None:
    forth, back = paired((1.0, 4.0, 2.0), (0.0, 1.0, 5.0)), paired((0.0, 1.0, 5.0), (1.0, 4.0, 2.0))
    assert (forth.mean, forth.p) == (-back.mean, back.p)
