"""Tandem repeats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gapfx.repeats import Repeat, tandem_repeats


def test_a_pattern_that_follows_itself_is_found_with_what_is_beside_it() -> None:
    assert tandem_repeats("xABABABy") == [Repeat(1, 2, 3)]
    assert tandem_repeats("AABAAB") == [Repeat(0, 3, 2)]
    assert tandem_repeats("eeeeXdcdcdcY") == [Repeat(0, 1, 4), Repeat(5, 2, 3)]


def test_the_shortest_period_wins_and_a_rest_belongs_to_no_copy() -> None:
    assert tandem_repeats("ABABABABA") == [Repeat(0, 2, 4)]


def test_nothing_repeats_in_different_items_in_one_item_and_in_none() -> None:
    assert tandem_repeats("ABCD") == tandem_repeats("A") == tandem_repeats("") == []


def test_spans_are_the_items_of_each_copy() -> None:
    [repeat] = tandem_repeats(["stem", "a", "b", "a", "b"])
    assert [list(span) for span in repeat.spans()] == [[1, 2], [3, 4]]
    assert repeat.stop == 5


@given(st.lists(st.integers(0, 2), max_size=40))
def test_copies_are_equal_and_repeats_do_not_overlap(items: list[int]) -> None:
    stop = 0
    for repeat in tandem_repeats(items):
        assert repeat.start >= stop
        assert repeat.copies >= 2
        copies = [[items[at] for at in span] for span in repeat.spans()]
        assert all(copy == copies[0] for copy in copies)
        stop = repeat.stop


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(2, 5))
def test_a_sequence_of_equal_copies_is_one_repeat(pattern: list[int], copies: int) -> None:
    [repeat] = tandem_repeats(pattern * copies)
    assert (repeat.start, repeat.stop) == (0, len(pattern) * copies)
