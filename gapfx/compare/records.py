"""What is kept of the finished runs of a study: one file, a line a run, from which its tables can be made again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gapfx.errors import UserError
from gapfx.method_settings import as_read
from gapfx.run_dir import write_atomically
from gapfx.settings import Settings, merge

RECORDS = "runs.jsonl"


@dataclass(frozen=True)
class Record:
    """One finished run: its settings, its metrics on the validation and the test data, and what it has cost.

    `flops` are the operations of its training, counted for the sparse form; `live_bytes` those of fp32 values with a
    bit a planned weight for the masks, and of all that is dense. `shares` are the live shares of weights at its end, by
    FQN, where the run has found them itself.
    """

    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    test: Mapping[str, float]
    flops: float
    live_bytes: float
    seconds: float
    epochs: float
    sparsity: float
    versions: Mapping[str, str]
    shares: Mapping[str, float] = field(default_factory=dict[str, float])

    def is_of(self, settings: Settings) -> bool:
        """Whether the run was made with these settings, as far as its method reads them.

        Those that came later have their default in it.
        """
        return as_read(merge(("", self.settings))) == as_read(settings)


@dataclass
class Records:
    """The records below `folder`, by the name of their run; every new one is written at once."""

    folder: Path
    found: dict[str, Record] = field(default_factory=dict[str, Record])

    @staticmethod
    def read(folder: Path) -> Records:
        """What is there. Raises UserError that names a line that is no record."""
        path, records = folder / RECORDS, Records(folder)
        lines = path.read_text().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = Record(**cast(dict[str, Any], json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"line {number} is no record of a run: {error}", where=str(path), fix="delete the line"
                ) from error
            records.found[record.name] = record
        return records

    def add(self, record: Record) -> None:
        """Write the record beside the others, in the place of an older one of its name."""
        self.found[record.name] = record
        lines = (json.dumps(dataclasses.asdict(each)) for each in self.found.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RECORDS, "".join(f"{line}\n" for line in lines))


def record_of(
    name: str,
    summary: Mapping[str, Any],
    settings: Settings,
    *,
    flops: float,
    epochs: float,
    shares: Mapping[str, float],
) -> Record:
    """The record of a run from its summary, its settings and what its plan costs."""
    return Record(
        name=name,
        settings=dataclasses.asdict(settings),
        metrics=summary["metrics"]["final"],
        test=summary["metrics"].get("test", {}),
        flops=flops,
        live_bytes=_live_bytes(summary),
        seconds=summary["seconds"],
        epochs=epochs,
        sparsity=summary["sparsity_actual"],
        versions=summary["versions"],
        shares=shares,
    )


def live_shares(summary: Mapping[str, Any]) -> dict[str, float]:
    """Live share of each planned weight at the end of a run, by FQN."""
    return {fqn: weight["kept"] / weight["numel"] for fqn, weight in summary["per_weight"].items()}


def _live_bytes(summary: Mapping[str, Any]) -> float:
    weights = summary["per_weight"].values()
    numel = sum(weight["numel"] for weight in weights)
    zeros = numel - sum(weight["kept"] for weight in weights)
    if not zeros:
        return 4.0 * summary["num_parameters"]
    return 4.0 * (summary["num_parameters"] - zeros) + numel / 8
