"""The exact threshold of the highest scores, from histograms: also of scores that lie in slices, on several ranks.

A score becomes an integer key of the same order. Sixteen bits of it at a time, from the highest, the keys that fall on
each value are counted (over all slices), and the search goes on with the value that holds the threshold: two rounds for
32-bit scores, four for 64, half a megabyte of counts each. -0.0 equals 0.0. Scores may not be NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gapfx.kernels import histogram

_DIGIT = 16
_MASK = (1 << _DIGIT) - 1
Total = Callable[[Tensor], Tensor]
Counts = Callable[[int, "int | None"], Tensor]


@dataclass(frozen=True)
class Threshold:
    """The unsigned key of the lowest score kept; keys above it in all slices; keys that equal it in this one."""

    key: int
    num_above: int
    num_tied: int


@dataclass(frozen=True)
class Keys:
    """Scores of a slice, flat, as ordered keys; native kernels make the keys while they read."""

    scores: Tensor
    width: int
    is_native: bool

    @staticmethod
    def of(score: Tensor) -> Keys:
        """Of scores of any shape and type."""
        flat = _narrow(score.detach().flatten())
        if histogram.can_take(flat):
            return Keys(flat, 32, True)
        ordered = _ordered(flat)
        return Keys(ordered, ordered.element_size() * 8, False)

    def threshold(self, num_kept: int, total: Total | None = None) -> Threshold:
        """Of the `num_kept` highest scores; `total` adds up counts over slices (collective)."""
        left, mine = self.scores, torch.empty(0)

        def counts(shift: int, prefix: int | None) -> Tensor:
            nonlocal left, mine
            left, mine = self._count(left, shift, prefix)
            return total(mine.clone()) if total else mine  # a sum may be written into what is added

        key, num_above = search(counts, self.width, num_kept)
        return Threshold(key, num_above, int(mine[key & _MASK]))

    def counts(self, shift: int, prefix: int | None) -> Tensor:
        """How many keys have each digit above `shift`, among those that begin with `prefix` (all for None)."""
        return self._count(self.scores, shift, prefix)[1]

    def num_equal(self, key: int) -> int:
        """How many keys equal `key`."""
        return int(self.counts(0, key >> _DIGIT)[key & _MASK])

    def mark(self, key: int, num_tied: int) -> Tensor:
        """Flat bool mask: True above `key`, and at the first `num_tied` places that equal it."""
        if self.is_native:
            return histogram.mark(self.scores, key, max(0, num_tied))
        signed = key - (1 << (self.width - 1))
        mask, tied = self.scores > signed, (self.scores == signed).nonzero().flatten()
        mask[tied[: max(0, num_tied)]] = True
        return mask

    def _count(self, left: Tensor, shift: int, prefix: int | None) -> tuple[Tensor, Tensor]:
        """The keys that begin with `prefix` (all for None), and how many of them have each next digit."""
        if self.is_native:
            return left, histogram.counts(left, prefix)
        top = 1 << (_DIGIT - 1) if prefix is None else 0  # the sign bit: negative keys come first
        if prefix is not None:
            left = left[(left >> (shift + _DIGIT)) == prefix - (1 << (self.width - shift - _DIGIT - 1))]
        digit = (left >> shift).bitwise_and(_MASK).long() ^ top
        return left, torch.bincount(digit, minlength=1 << _DIGIT)


def search(counts: Counts, width: int, num_kept: int) -> tuple[int, int]:
    """The key of the lowest of the `num_kept` highest scores, and how many keys are above it.

    `counts(shift, prefix)` counts the keys that begin with `prefix` (all for None) by their digit above `shift`.
    """
    num_above, prefix = 0, None
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        found = counts(shift, prefix)
        from_top = found.flip(0).cumsum(0).flip(0)  # how many keys have this digit or a higher one
        value = int((from_top >= num_kept - num_above).sum()) - 1
        num_above += int(from_top[value] - found[value])
        prefix = (prefix or 0) << _DIGIT | value
    return prefix or 0, num_above


def key_of(score: Tensor) -> int:
    """The unsigned key of one score."""
    ordered = _ordered(_narrow(score.detach()))
    return int(ordered) + (1 << (ordered.element_size() * 8 - 1))


def digit_counts(keys: Iterable[int], shift: int, prefix: int | None) -> Tensor:
    """What `Keys.counts` gives, of a few keys."""
    digits = [key >> shift & _MASK for key in keys if prefix is None or key >> (shift + _DIGIT) == prefix]
    return torch.bincount(torch.tensor(digits, dtype=torch.int64), minlength=1 << _DIGIT)


def num_nan(score: Tensor) -> int:
    """How many scores are NaN."""
    return histogram.num_nan(score) if histogram.can_take(score) else int(score.isnan().sum())


def _narrow(flat: Tensor) -> Tensor:
    """The same scores in a type that has keys; of 32 bits where they fit."""
    if flat.dtype.is_floating_point:
        return flat if flat.dtype in (torch.float64, torch.bfloat16) else flat.float()
    return flat if flat.element_size() == 8 else flat.to(torch.int32)


def _ordered(flat: Tensor) -> Tensor:
    """Signed integers in the order of the scores."""
    if not flat.dtype.is_floating_point:
        return flat
    wide = flat if flat.dtype is torch.float64 else flat.float()
    raw = (wide + 0.0).view(torch.int64 if wide.dtype is torch.float64 else torch.int32)  # + 0.0: -0.0 equals 0.0
    # Among negative numbers the larger magnitude is the smaller one: flip all bits but the sign.
    return raw ^ ((raw >> (raw.element_size() * 8 - 1)) & torch.iinfo(raw.dtype).max)
