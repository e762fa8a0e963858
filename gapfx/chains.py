"""Cutting a chain into consecutive parts, and short names for the parts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

MAX_NAME = 60


def cut_equal(length: int, parts: int) -> list[int]:
    """Part of each of `length` items: equal counts, the first parts one longer where they do not divide."""
    count, longer = divmod(length, parts)
    return [part for part in range(parts) for _ in range(count + (part < longer))]


def cut_min_max(sizes: Sequence[int], parts: int) -> list[int]:
    """Part of each item such that the largest part is as small as possible; every part has an item.

    Dynamic programme over (parts, prefix): the best cut is where the growing cost of the front meets the shrinking
    size of the last part, so it is found by bisection in O(parts * n log n).
    """
    total = [0, *accumulate(sizes)]
    best = total
    cuts: list[list[int]] = []
    for part in range(2, parts + 1):
        cut = [_best_cut(best, total, part - 1, end) if end >= part else 0 for end in range(len(total))]
        best = [max(best[at], total[end] - total[at]) for end, at in enumerate(cut)]
        cuts.append(cut)
    bounds = [len(sizes)]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    spans = pairwise([0, *reversed(bounds)])
    return [part for part, (start, stop) in enumerate(spans) for _ in range(stop - start)]


def _best_cut(best: Sequence[int], total: Sequence[int], low: int, end: int) -> int:
    """Where the last part starts: best[at] grows with `at`, total[end] - total[at] shrinks."""
    meet = bisect_left(range(low, end), True, key=lambda at: best[at] >= total[end] - total[at]) + low
    return min((at for at in (meet - 1, meet) if low <= at < end), key=lambda at: max(best[at], total[end] - total[at]))


def span_name(names: Sequence[str]) -> str:
    """`encoder.layers.0`, `encoder.layers.1`, `decoder.layers.0` -> `encoder.layers.0-1+decoder.layers.0`."""
    spans: list[tuple[str, int, int]] = []
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)", name)
        stem, number = (match[1], int(match[2])) if match else (name, -1)
        if spans and number >= 0 and spans[-1][0] == stem and spans[-1][2] + 1 == number:
            spans[-1] = (stem, spans[-1][1], number)
        else:
            spans.append((stem, number, number))
    texts = [_span_text(*span) for span in spans]
    joined = "+".join(texts)
    return joined if len(joined) <= MAX_NAME or len(texts) == 1 else f"{texts[0]}..{texts[-1]}"


def _span_text(stem: str, first: int, last: int) -> str:
    if first < 0:
        return stem
    return f"{stem}{first}" if first == last else f"{stem}{first}-{last}"


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with `#2`, `#3` after a name that came before."""
    return [name if (n := names[:i].count(name)) == 0 else f"{name}#{n + 1}" for i, name in enumerate(names)]
