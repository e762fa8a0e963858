"""Time limits of a bench, and timings that are stopped by them or by Ctrl-C without losing what is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from gapfx.bench.findings import Timing, What
from gapfx.calibration.measure import LEAST_ROUNDS, interleaved

Run = Callable[[], object]
T = TypeVar("T")
OUT_OF_TIME = "no time was left: give more --seconds"
WARM_UPS = 2
LEAST_CALLS = WARM_UPS + LEAST_ROUNDS  # of each way that is timed, after its first


@dataclass
class Stopwatch:
    """Collects timings until the time is up; `left` is what remains of it, in seconds.

    `longest` has what each kind of thing that nothing breaks off took at most, `notes` are for people.
    """

    seconds: float
    timings: list[Timing] = field(default_factory=list[Timing])
    began: float = field(default_factory=time.monotonic)
    longest: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, kind: str, action: Callable[[], T]) -> T:
        """What `action` gives, however long it takes; the seconds are kept in `longest`."""
        began = time.monotonic()
        try:
            return action()
        finally:
            self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - began)

    def begin(self, kind: str, action: Callable[[], T], *, estimate: float = 0.0, spare: float = 0.0) -> T | str:
        """What `action` gives, or OUT_OF_TIME where all but `spare` of the time that is left would not do for it.

        It should take what the longest of its kind has taken, the first of a kind what is estimated.
        """
        return OUT_OF_TIME if self.longest.get(kind, estimate) >= self.left - spare else self.keep(kind, action)

    def begin_each(self, kind: str, actions: Sequence[Callable[[], object]], *, spare: float = 0.0) -> None:
        """All actions of a kind as far as the time goes but `spare`; a note says how many were left out."""
        left_out = sum(self.begin(kind, action, spare=spare) == OUT_OF_TIME for action in actions)
        if left_out:
            self.notes.append(f"{left_out} of {len(actions)} timings of a {kind}: {OUT_OF_TIME}")

    def time(self, subject: str, what: What, positions: int, runs: Mapping[str, Run], seconds: float) -> None:
        """Time runs of the same thing in turns, for about `seconds`, each with its way as a name."""
        threads = torch.get_num_threads()
        self.time_rows({Timing(subject, what, way, threads, positions): run for way, run in runs.items()}, seconds)

    def time_rows(self, rows: Mapping[Timing, Run], seconds: float) -> None:
        """Time runs of the same thing in turns, for about `seconds`; the keys say what each is."""
        able: dict[str, Run] = {}
        needed = 0.0
        for row, run in rows.items():
            if needed >= self.left:
                self.timings.append(dataclasses.replace(row, reason=OUT_OF_TIME))
                continue
            once, reason = _called(run)
            # Those that come first are timed where the time is not enough for all: dense is among them.
            reason = reason or (OUT_OF_TIME if needed + LEAST_CALLS * once > self.left else "")
            if reason:
                self.timings.append(dataclasses.replace(row, reason=reason))
            else:
                needed, able[row.way] = needed + LEAST_CALLS * once, run
        # A round that has begun is ended.
        outside = (WARM_UPS + 1) * needed / LEAST_CALLS
        found = interleaved(able, min(seconds, max(0.0, self.left - outside)))
        self.timings += [dataclasses.replace(row, seconds=found[row.way]) for row in rows if row.way in found]

    def miss(self, subject: str, what: What, positions: int, way: str, reason: str) -> None:
        """Keep why a way was not timed."""
        self.timings.append(Timing(subject, what, way, torch.get_num_threads(), positions, reason=reason))


def _called(run: Run) -> tuple[float, str]:
    """Seconds of a call, and what it failed with."""
    began, reason = time.monotonic(), ""
    try:
        run()
    except Exception as error:
        reason = reason_of(error)
    return time.monotonic() - began, reason


def reason_of(error: Exception) -> str:
    """The first line of what it says, and the next one too where the first only announces it."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    told = 2 if lines[0].rstrip().endswith(":") else 1
    return " ".join(line.strip() for line in lines[:told])[:200]
