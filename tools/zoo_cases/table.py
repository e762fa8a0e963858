"""COVERAGE.md: what the results of a sweep say, as Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
CONDITIONS = (
    "Made by `tools/zoo.py table`. Each architecture is random initialised and small, runs in a process of its own,",
    "and is compared with the same model whose weights and gradients are multiplied by the masks by hand:",
    "one training step, evaluation, and another batch size. Equal: within 1e-5 of the largest value of each tensor",
    "(outputs, loss, every gradient, every weight after the step, every buffer); `to the bit` counts those with no",
    "difference at all. An architecture that does not run a forward and a backward without gapfx is listed and not",
    "counted.",
)
COLUMNS = (
    "library",
    "run in eager",
    "pass every check",
    "fail",
    "to the bit",
    "capture + plan, s: median / max",
    "more than 3 forwards + 2 s",
    "peak MiB: median / max",
)


def markdown(rows: Sequence[Row]) -> str:
    """The whole page: a summary by library, every failure with its cause, and every architecture by name."""
    by_library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_library[row["key"].partition("/")[0]].append(row)
    parts = [
        "# Coverage",
        " ".join(CONDITIONS),
        _summary(by_library),
        *_failures(rows),
        *(_listing(library, items) for library, items in by_library.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(by_library: dict[str, list[Row]]) -> str:
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    total: list[Row] = []
    for library, rows in (*by_library.items(), ("all", total)):
        runnable = [row for row in rows if row["status"] != "not runnable"]
        total += runnable if library != "all" else []
        lines.append(_summary_line(library, runnable))
    return "\n".join(lines)


def _summary_line(library: str, rows: Sequence[Row]) -> str:
    passed = sum(row["status"] == "passed" for row in rows)
    bits = sum(all(row["facts"].get(f"{name}_bits", False) for name in ("train", "eval")) for row in rows)
    times = [row["facts"]["compile_seconds"] for row in rows if "compile_seconds" in row["facts"]]
    slow = sum(_is_slow(row) for row in rows)
    peaks = [row["facts"]["peak_mib"] for row in rows if "peak_mib" in row["facts"]]
    cells = [library, len(rows), passed, len(rows) - passed, bits, _spread(times, 2), slow, _spread(peaks, 0)]
    return f"| {' | '.join(map(str, cells))} |"


def _is_slow(row: Row) -> bool:
    facts = row["facts"]
    return facts.get("compile_seconds", 0) > 3 * facts.get("forward_seconds", 0) + 2


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}" if values else "-"


def _failures(rows: Iterable[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] == "failed"]
    idle = [row for row in rows if row["status"] == "not runnable"]
    parts = ["## Failures" if failed else "## Failures\n\nNone."]
    parts += ["\n".join(_cause_line(row) for row in failed)] if failed else []
    if idle:
        parts += ["## Not runnable without gapfx", "\n".join(_cause_line(row) for row in idle)]
    return parts


def _cause_line(row: Row) -> str:
    causes = "; ".join(f"{name}: {' '.join(cause.split())[:300]}" for name, cause in row["failures"].items())
    return f"- `{row['key']}`: {causes}"


def _listing(library: str, rows: Sequence[Row]) -> str:
    marks = {"passed": "", "failed": " (fails)", "not runnable": " (not runnable)"}
    names = [f"{row['key'].partition('/')[2]}{marks[row['status']]}" for row in rows]
    return f"## {library}\n\n{', '.join(names)}"
