"""Time limits of a bench, and timings that are stopped by them or by Ctrl-C without losing what is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from gapfx.bench.findings import Timing, What
from gapfx.calibration.measure import interleaved

Run = Callable[[], object]


@dataclass
class Stopwatch:
    """Collects timings until the time is up; `left` is what remains of it, in seconds."""

    seconds: float
    timings: list[Timing] = field(default_factory=list[Timing])
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.seconds - (time.monotonic() - self.began)

    def time(self, subject: str, what: What, positions: int, runs: Mapping[str, Run], seconds: float) -> None:
        """Time runs of the same thing in turns, for about `seconds`, each with its way as a name."""
        threads = torch.get_num_threads()
        self.time_rows({Timing(subject, what, way, threads, positions): run for way, run in runs.items()}, seconds)

    def time_rows(self, rows: Mapping[Timing, Run], seconds: float) -> None:
        """Time runs of the same thing in turns, for about `seconds`; the keys say what each is."""
        if self.left <= 0:
            self.timings += [dataclasses.replace(row, reason=OUT_OF_TIME) for row in rows]
            return
        able: dict[str, Run] = {}
        for row, run in rows.items():
            try:
                run()
                able[row.way] = run
            except Exception as error:
                self.timings.append(dataclasses.replace(row, reason=_reason(error)))
        found = interleaved(able, min(seconds, max(0.0, self.left)))
        self.timings += [dataclasses.replace(row, seconds=found[row.way]) for row in rows if row.way in found]

    def miss(self, subject: str, what: What, positions: int, way: str, reason: str) -> None:
        """Keep why a way was not timed."""
        self.timings.append(Timing(subject, what, way, torch.get_num_threads(), positions, reason=reason))


def _reason(error: Exception) -> str:
    """The first line of what it says, and the next one too where the first only announces it."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    told = 2 if lines[0].rstrip().endswith(":") else 1
    return " ".join(line.strip() for line in lines[:told])[:200]


OUT_OF_TIME = "no time was left: give more --seconds"
