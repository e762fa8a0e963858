"""Tandem repeats: stretches of a sequence in which one pattern follows itself, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Repeat:
    """`copies` (two or more) of a pattern of `period` items, one after the other from item `start`."""

    start: int
    period: int
    copies: int

    @property
    def stop(self) -> int:
        """One past the last item."""
        return self.start + self.period * self.copies

    def spans(self) -> Iterator[range]:
        """The items of each copy."""
        for start in range(self.start, self.stop, self.period):
            yield range(start, start + self.period)


def tandem_repeats(items: Sequence[Hashable]) -> list[Repeat]:
    """Repeats that do not overlap, in order: the longest first, of the shortest period, then what is beside it.

    O(n^2) comparisons of numbers for n items, of which numpy makes 1e9 a second: 10,000 items take a tenth of that.
    """
    codes: dict[Hashable, int] = {}
    numbers = np.array([codes.setdefault(item, len(codes)) for item in items], dtype=np.int64)
    return sorted(_within(numbers, 0), key=lambda repeat: repeat.start)


def _within(numbers: NDArray[np.int64], offset: int) -> Iterator[Repeat]:
    best = max(_runs(numbers), key=lambda run: (run.stop - run.start, -run.period, -run.start), default=None)
    if best is None:
        return
    yield Repeat(best.start + offset, best.period, best.copies)
    yield from _within(numbers[: best.start], offset)
    yield from _within(numbers[best.stop :], offset + best.stop)


def _runs(numbers: NDArray[np.int64]) -> Iterator[Repeat]:
    """The longest run of each period that has one."""
    for period in range(1, len(numbers) // 2 + 1):
        equal = numbers[:-period] == numbers[period:]
        ends = np.flatnonzero(np.diff(np.concatenate(([0], equal.view(np.int8), [0]))))
        starts, lengths = ends[::2], ends[1::2] - ends[::2]
        if len(lengths) and lengths.max() >= period:
            at = int(lengths.argmax())
            yield Repeat(int(starts[at]), period, int(lengths[at]) // period + 1)
