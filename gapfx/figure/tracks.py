"""Tracks: side by side places for lines that would lie on each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

# Way -> net -> track, counted from 0.
Tracks = Mapping[Hashable, Mapping[str, int]]

CLEARANCE = 5.0  # pixels between the ends of two lines in one track


@dataclass
class Ways:
    """Stretches that nets ask for in each way (a rail, a gutter, a channel); a net has one stretch in each way."""

    _stretches: defaultdict[Hashable, dict[str, tuple[float, float]]] = field(
        default_factory=lambda: defaultdict[Hashable, dict[str, tuple[float, float]]](dict)
    )

    def ask(self, way: Hashable, net: str, start: float, stop: float) -> None:
        """Make sure that the net's stretch in the way holds everything between two points."""
        low, high = self._stretches[way].get(net, (start, start))
        self._stretches[way][net] = (min(low, start, stop), max(high, start, stop))

    def tracks(self) -> Tracks:
        """Way -> net -> track, counted from 0; stretches in one track do not touch."""
        return {way: _first_fit(stretches) for way, stretches in self._stretches.items()}


def _first_fit(stretches: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    ends: list[float] = []
    found: dict[str, int] = {}
    for net, (low, high) in sorted(stretches.items(), key=lambda item: (item[1], item[0])):
        free = (track for track, end in enumerate(ends) if end + CLEARANCE <= low)
        track = next(free, len(ends))
        ends[track : track + 1] = [high]
        found[net] = track
    return found


def num_tracks(tracks: Tracks, way: Hashable) -> int:
    """Tracks of one way."""
    return 1 + max(tracks.get(way, {}).values(), default=-1)
