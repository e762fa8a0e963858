"""The rows of a comparison as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from gapfx.compare.outcomes import Row
from gapfx.quantities import format_bytes, format_count

HEADS = {
    "epochs": "At equal epochs",
    "flops": "At equal operations of training, counted for the sparse form",
}
_COLUMNS = (
    "method",
    "sparsity",
    "mean",
    "sd",
    "by seed",
    "against dense",
    "p",
    "epochs",
    "operations",
    "live bytes",
    "seconds",
)


def markdown(rows: Sequence[Row], metric: str) -> str:
    """One table a budget. `p` is of no difference from the dense run of the same seed (exact sign-flip test)."""
    parts: list[str] = []
    for budget in dict.fromkeys(row.budget for row in rows):
        found = [cells(row) for row in rows if row.budget == budget]
        head = columns(metric)
        lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *found)]
        parts.append("\n".join([f"**{HEADS[budget]}**", "", *lines]))
    return "\n\n".join(parts)


def text(rows: Sequence[Row], metric: str) -> str:
    """The same in columns for a terminal."""
    parts: list[str] = []
    for budget in dict.fromkeys(row.budget for row in rows):
        found = [columns(metric), *(cells(row) for row in rows if row.budget == budget)]
        widths = [max(len(line[column]) for line in found) for column in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in found]
        parts.append("\n".join([f"{HEADS[budget]}:", *(line.rstrip() for line in lines)]))
    return "\n\n".join(parts)


def as_json(rows: Sequence[Row], metric: str) -> str:
    """All numbers."""
    return json.dumps({"metric": metric, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)


def columns(metric: str) -> list[str]:
    """Names of the columns."""
    return [f"{metric}, mean" if name == "mean" else name for name in _COLUMNS]


def cells(row: Row) -> list[str]:
    """One line of a table."""
    against = row.against
    return [
        row.name,
        f"{row.sparsity:g}",
        f"{row.value.mean:.4f}",
        f"{row.value.deviation:.4f}",
        ", ".join(f"{value:.4f}" for value in row.value.values),
        f"{against.mean:+.4f}" if against else "",
        f"{against.p:.2f}" if against else "",
        f"{row.epochs:.1f}",
        format_count(row.flops),
        format_bytes(row.live_bytes),
        f"{row.seconds:.0f}",
    ]
