"""Cutting chains and naming the parts."""

from itertools import combinations, groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapfx.chains import cut_equal, cut_min_max, span_name, unique_names


@pytest.mark.parametrize(
    ("length", "parts", "cut"),
    [(4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (5, 3, [0, 0, 1, 1, 2]), (3, 3, [0, 1, 2]), (2, 1, [0, 0])],
)
def test_equal_counts(length: int, parts: int, cut: list[int]) -> None:
    assert cut_equal(length, parts) == cut


def largest(sizes: list[int], cut: list[int]) -> int:
    return max(sum(sizes[i] for i in range(len(sizes)) if cut[i] == part) for part in set(cut))


@given(st.data())
def test_the_largest_part_is_as_small_as_any_cut_can_make_it(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    parts = data.draw(st.integers(1, len(sizes)))
    cut = cut_min_max(sizes, parts)
    assert [part for part, _ in groupby(cut)] == list(range(parts))
    bounds = ([0, *inner, len(sizes)] for inner in combinations(range(1, len(sizes)), parts - 1))
    best = min(max(sum(sizes[a:b]) for a, b in pairwise(bound)) for bound in bounds)
    assert largest(sizes, cut) == best


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["encoder.layers.0", "encoder.layers.1"], "encoder.layers.0-1"),
        (["e.9", "e.10", "d.0"], "e.9-10+d.0"),
        (["e.0", "e.2"], "e.0+e.2"),
        (["conv1", "layer1", "layer2"], "conv1+layer1-2"),
        (["fc"], "fc"),
        (
            [f"a_rather_long_name.{part}.weight" for part in "abcd"],
            "a_rather_long_name.a.weight..a_rather_long_name.d.weight",
        ),
    ],
)
def test_names_of_parts_are_short(names: list[str], text: str) -> None:
    assert span_name(names) == text


def test_equal_names_are_numbered() -> None:
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
