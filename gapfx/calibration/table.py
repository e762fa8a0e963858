"""Answers for many cases: from the file, else measured within a time limit, else from stored gains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gapfx.calibration.break_evens import MADE_DENSE, expected_gain
from gapfx.calibration.cache import read_times, write_times
from gapfx.calibration.cases import Case, Times
from gapfx.calibration.measure import measure
from gapfx.calibration.refusals import refusal
from gapfx.kernels import native
from gapfx.plan import Kernel

SMALLEST_WORK = 1_000_000  # below, calls cost more than what they compute
LEAST_WIN = 0.95  # a kernel within this of the other is not worth a change: noise would decide
LIMIT_SECONDS = 30.0
NOMINAL_RATE = 4e10  # multiplications a second, so that estimates of several cases can be added


@dataclass(frozen=True)
class Answers:
    """Times of every case. Only those of `measured` are of this machine; of the others the ratios alone say something.

    `notes` are for people.
    """

    times: Mapping[Case, Times]
    measured: frozenset[Case]
    notes: tuple[str, ...] = ()


def better(times: Times) -> Kernel:
    """The faster kernel; `expand` where they are level."""
    return "sparse" if times.sparse is not None and times.sparse < LEAST_WIN * times.expand else "expand"


def answer(cases: Iterable[Case], *, calibrate: bool = True, limit_seconds: float = LIMIT_SECONDS) -> Answers:
    """Times of every case, the heaviest measured first; what the limit leaves out is estimated, with a note."""
    wanted = sorted(dict.fromkeys(cases), key=lambda case: (-case.work, case.key()))
    large = [case for case in wanted if case.work >= SMALLEST_WORK and not refusal(case)]
    notes: list[str] = []
    times: dict[Case, Times] = {}
    if calibrate:
        found = read_times()
        notes += [found.note] * bool(found.note)
        times = {case: found.times[case.key()] for case in wanted if case.key() in found.times}
        fresh, trouble = _measured([case for case in large if case not in times], limit_seconds)
        times |= fresh
        notes += [trouble] * bool(trouble)
        left = sum(case not in times for case in large)
        if left:
            notes.append(
                f"kernels: {left} of {len(large)} shapes were not measured within {limit_seconds:.2g} s, "
                "stored break-evens decide for them; run it again to measure more"
            )
    measured = frozenset(times)
    times |= {case: _estimate(case) for case in wanted if case not in times}
    return Answers(times, measured, tuple(notes))


def _measured(cases: list[Case], limit_seconds: float) -> tuple[dict[Case, Times], str]:
    """Times, and why they could not be kept, or "". What was measured before Ctrl-C is kept too."""
    began, found, trouble = time.monotonic(), dict[Case, Times](), ""
    last = 0.0  # of a heavier case: the next one takes no longer
    try:
        for case in cases:
            start = time.monotonic()
            if start - began + last >= limit_seconds:
                break
            found[case] = measure(case)
            last = time.monotonic() - start
    finally:
        if found:
            trouble = write_times({case.key(): item for case, item in found.items()})
    return found, trouble


def _estimate(case: Case) -> Times:
    gain = 0.0
    if case.work >= SMALLEST_WORK and not refusal(case):
        gain = expected_gain(case, has_instructions=native.level() == "avx512")
    dense = 3 * case.work / NOMINAL_RATE
    return Times(dense, dense / MADE_DENSE, dense / gain if gain else None)
