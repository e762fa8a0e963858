"""Axes: scales with round ticks, limits that one outlier cannot ruin, and fewer points for the same picture."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = tuple[tuple[float, float], ...]  # (step, value), finite, in order of step


@dataclass(frozen=True)
class Scale:
    """Maps `low..high` to 0..1, on a line or on its logarithm."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Place of `value` as a share of the axis; outside of 0..1 when it is outside of the limits."""
        if self.is_log:
            if value <= 0:
                return 0.0
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def ticks(scale: Scale, count: int) -> tuple[float, ...]:
    """About `count` round values inside the scale."""
    return _log_ticks(scale, count) if scale.is_log else _linear_ticks(scale, count)


def tick_labels(values: Sequence[float]) -> tuple[str, ...]:
    """The ticks with one number of decimals for all of them."""
    if not values:
        return ()
    gap = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) or 1.0)
    if max(map(abs, values)) >= 1e4 and gap >= 100 and all(value % 100 == 0 for value in values):
        return tuple(f"{value / 1000:,g}k" if value else "0" for value in values)
    if gap < 1e-4 or max(map(abs, values)) >= 1e7:
        return tuple(f"{value:.3g}" for value in values)
    decimals = next(d for d in range(7) if abs(gap * 10**d - round(gap * 10**d)) < 1e-6 * 10**d * gap or d == 6)
    return tuple(f"{value:,.{decimals}f}" if value else "0" for value in values)


def log_labels(values: Sequence[float]) -> tuple[str, ...]:
    """Ticks of a log axis, each as short as it can be."""
    return tuple(f"{value:,g}" if 1e-4 <= value < 1e6 else f"{value:.0e}" for value in values)


def padded(values: Sequence[float], share: float = 0.08) -> Scale:
    """A linear scale around the values with a margin of `share` of their range on both sides."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - margin, high + margin)


def loss_scale(values: Sequence[float]) -> Scale:
    """Log when the values span more than a factor of 12; else linear, with the top set by the 99th percentile."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    calm = ordered[math.floor(0.99 * (len(ordered) - 1))]
    if low > 0 and calm / low > 12:
        return Scale(low / 1.15, min(high, 4 * calm) * 1.15, is_log=True)
    top = high if high - low < 3 * (calm - low) else calm + 0.25 * (calm - low)
    return padded((low, top), 0.06)


def thinned(points: Points, limit: int = 600) -> Points:
    """At most about `limit` points that keep the lowest and highest value of every stretch."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return tuple(kept)


def smoothed(points: Points, boundaries: Sequence[float]) -> Points:
    """Mean of the nearest 3 % of the points that lie in the same phase; a phase starts after each of `boundaries`."""
    reach, edges = max(1, round(0.015 * len(points))), sorted(boundaries)
    phases = [list(members) for _, members in itertools.groupby(points, key=lambda p: bisect.bisect_left(edges, p[0]))]
    result: list[tuple[float, float]] = []
    for members in phases:
        sums = list(itertools.accumulate((value for _, value in members), initial=0.0))
        for index, (step, _) in enumerate(members):
            near = min(reach, index, len(members) - 1 - index)  # symmetric, so that a slope is not shifted
            result.append((step, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return tuple(result)


def _linear_ticks(scale: Scale, count: int) -> tuple[float, ...]:
    rough = (scale.high - scale.low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _log_ticks(scale: Scale, count: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    inside: tuple[float, ...] = ()
    for factors in ((1,), (1, 3), (1, 2, 5)):
        candidates = [factor * 10.0**decade for decade in decades for factor in factors]
        found = tuple(float(f"{value:.3g}") for value in candidates if scale.low <= value <= scale.high)
        if inside and len(found) > count:
            break
        inside = found
    every = max(1, math.ceil(len(inside) / (count + 1)))
    return inside[::every]
