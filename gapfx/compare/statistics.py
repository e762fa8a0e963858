"""Means over seeds, and how surely two methods differ when every seed trained both."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST_PAIRS = 16  # of which all signs are tried; of more, NUM_DRAWS are drawn
NUM_DRAWS = 2**MOST_PAIRS


@dataclass(frozen=True)
class Spread:
    """Values by seed, with their mean and sample standard deviation (None for one value)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the p of no difference: two-sided, by the signs that chance could have given.

    With n seeds p is at least 2 / 2^n: three seeds cannot show more than 0.25, however clear they look.
    """

    mean: float
    p: float
    num_pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare values of the same seeds, in the same order (a sign-flip test, Fisher 1935; exact for up to 16 pairs)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    seen = abs(sum(differences))
    flips = list(_flips(len(differences)))
    rounding = 1e-12 * max(1.0, seen)
    as_large = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen - rounding for signs in flips
    )
    return Difference(statistics.mean(differences), as_large / len(flips), len(differences))


def _flips(count: int) -> Iterable[tuple[int, ...]]:
    if count <= MOST_PAIRS:
        return itertools.product((1, -1), repeat=count)
    draw = random.Random(0)
    drawn = (tuple(draw.choices((1, -1), k=count)) for _ in range(NUM_DRAWS - 1))
    return itertools.chain([(1,) * count], drawn)  # what was seen is one of the ways
