"""One conclusion for each thing that was timed, on which a person can act; and all timings as a table."""

from __future__ import annotations

from collections.abc import Iterator

from gapfx.bench.findings import DENSE, Findings, Timing, What
from gapfx.bench.run_verdict import run_verdicts

LEAST_GAIN = 1.05
MODEL = "the model"
NAMES: dict[What, str] = {"forward": "inference", "step": "a training step"}
BLOCKS = "4x1"
GROWN = ", a group dense"


def format_findings(findings: Findings) -> str:
    """A table of all timings, what could not be timed and why, and the verdict."""
    title = f"{findings.device}, {findings.dtype}, {findings.sparsity:.0%} sparse, {findings.pattern}"
    rows = [_row(findings, timing) for timing in findings.timings if timing.seconds]
    parts = [title, "", *_aligned(rows), "", *_missing(findings), *findings.notes, *verdicts(findings)]
    return "\n".join(parts)


def verdicts(findings: Findings) -> list[str]:
    """One sentence for each of inference and training, number of threads and positions of the whole model.

    Of a run, one for each number of threads.
    """
    of_model = [t for t in findings.timings if t.subject == MODEL and not t.batch]
    subjects: dict[tuple[What, int, int], None] = {(t.what, t.threads, t.positions): None for t in of_model}
    lines = [line for what, threads, positions in subjects for line in _verdict(findings, what, threads, positions)]
    return [*lines, *run_verdicts(findings)]


def _missing(findings: Findings) -> Iterator[str]:
    """Each reason once, with the ways that it is of."""
    ways: dict[tuple[str, str], dict[str, None]] = {}
    for timing in findings.timings:
        if not timing.seconds:
            ways.setdefault((_at_batch(timing), timing.reason), {})[timing.way] = None
    for (where, reason), named in ways.items():
        yield f"{', '.join(named)}{where}: {reason}"


def _at_batch(timing: Timing) -> str:
    return f" at batch {timing.batch}" if timing.batch else ""


def _verdict(findings: Findings, what: What, threads: int, positions: int) -> Iterator[str]:
    timed = [
        timing
        for timing in findings.timings
        if (timing.subject, timing.what, timing.threads, timing.positions) == (MODEL, what, threads, positions)
        and timing.seconds
    ]
    gains = {timing.way: findings.gain(timing) or 0.0 for timing in timed if timing.way != DENSE}
    lowered = {way: gain for way, gain in gains.items() if way.startswith(("expand", "sparse"))}
    ours = {way: gain for way, gain in lowered.items() if GROWN not in way}
    if not ours:
        return
    best = max(ours, key=lambda way: ours[way])
    where = f"{NAMES[what]} at {positions:,} positions on {threads} thread{'s' * (threads > 1)}"
    plain = {way: gain for way, gain in ours.items() if BLOCKS not in way}
    own = max(plain, key=lambda way: plain[way]) if plain else best
    text = f"{where}: {ours[own]:.2f}x of dense torch ({own})"
    if ours[own] < LEAST_GAIN:
        text = f"{where}: {ours[own]:.2f}x of dense torch: this sparsity will not speed the model up here"
    if own + GROWN in lowered:
        text += f", {lowered[own + GROWN]:.2f}x with a group dense"
    if best != own and ours[best] > LEAST_GAIN * max(1.0, ours[own]):
        text += f"; blocks of 4x1 would: {ours[best]:.2f}x" if ours[own] < LEAST_GAIN else f"; 4x1: {ours[best]:.2f}x"
    others = {way: gain for way, gain in gains.items() if way not in lowered and gain > max(1.0, ours[best])}
    if others:
        fastest = max(others, key=lambda way: others[way])
        text += f"; dense with {fastest.removeprefix('dense ')} is faster: {others[fastest]:.2f}x"
    yield text


def _row(findings: Findings, timing: Timing) -> tuple[str, ...]:
    gain = findings.gain(timing)
    return (
        timing.subject + _at_batch(timing),
        timing.what,
        f"{timing.positions:,}",
        str(timing.threads),
        timing.way,
        f"{timing.seconds * 1e3:.3f} ms",
        "" if gain is None else f"{gain:.2f}x",
        timing.kernel,
    )


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    lines = [("subject", "what", "positions", "threads", "way", "median", "speed-up", "kernel"), *rows]
    if not any(row[-1] for row in rows):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in (2, 3, 5, 6) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
