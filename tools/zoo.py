"""The public zoo: runs every check on public architectures, each in a process of its own, and writes the table.

    python tools/zoo.py sweep timm --results zoo.jsonl
    python tools/zoo.py one hand-made/lstm
    python tools/zoo.py gather zoo.jsonl more.jsonl
    python tools/zoo.py table

A sweep that was interrupted goes on where it stopped: cases that are in the results are skipped.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.zoo_cases.cases import Case
from tools.zoo_cases.checks import check
from tools.zoo_cases.isolation import run_isolated
from tools.zoo_cases.table import markdown
from tools.zoo_cases.two_ranks import TWO_RANKS, check_two_ranks

LIBRARIES = ("hand-made", "timm", "torchvision", "diffusers", "torch_geometric", "transformers")
RESULTS = Path(__file__).parent / "zoo_cases" / "results.jsonl"
COVERAGE = Path(__file__).parent.parent / "COVERAGE.md"
app = typer.Typer(add_completion=False, help=__doc__)


def load_cases(library: str) -> list[Case]:
    """The cases of one library; importing it can take seconds."""
    return list(_module(library).cases())


def sample_names(library: str) -> Collection[str]:
    """Names of the library's cases that are quick and unlike each other."""
    return _module(library).SAMPLE


def two_rank_names(library: str) -> Collection[str]:
    """Names of the library's cases that also run on two ranks."""
    return TWO_RANKS[library].split()


def _module(library: str) -> Any:
    name = {"hand-made": "hard_cases"}.get(library, f"{library}_models")
    return importlib.import_module(f"tools.zoo_cases.{name}")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each case by key."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["key"]: row for row in rows}


@app.command()
def sweep(
    libraries: Annotated[list[str] | None, typer.Argument(help="hand-made, timm, ...; all without")] = None,
    results: Annotated[Path, typer.Option(help="one JSON line a case; added to")] = Path("zoo.jsonl"),
    only: Annotated[str, typer.Option(help="glob of LIBRARY/NAME")] = "*",
    redo: Annotated[str, typer.Option(help="cases with this status are run again: failed, passed, ... or all")] = "",
    seconds: Annotated[float, typer.Option(help="time limit of each case in place of its own")] = 0,
    sample: Annotated[bool, typer.Option("--sample", help="only the fast sample of each library")] = False,
    two_ranks: Annotated[
        bool, typer.Option("--two-ranks", help="a sample on two ranks, in place of all checks")
    ] = False,
) -> None:
    """Run the cases that are not in the results yet."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for library in libraries or LIBRARIES:
        names = two_rank_names(library) if two_ranks else sample_names(library) if sample else None
        cases = [case for case in load_cases(library) if names is None or case.name in names]
        suffix, checks = (" on two ranks", check_two_ranks) if two_ranks else ("", check)
        for case in _wanted(cases, only, read_results(results), redo, suffix):
            row: dict[str, Any] = run_isolated(case, seconds, checks)
            row |= {"commit": _commit(), "versions": _versions(library)}
            counts[row["status"]] += 1
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            causes = "; ".join(f"{name}: {cause[:160]}" for name, cause in row["failures"].items())
            typer.echo(f"{row['status']:>12} {row['facts']['seconds']:6.1f} s  {case.key}  {causes}")
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing to run")


@app.command()
def one(key: Annotated[str, typer.Argument(help="LIBRARY/NAME")]) -> None:
    """Check one case in this process and print its result."""
    case = next((case for case in load_cases(key.partition("/")[0]) if case.key == key), None)
    if case is None:
        typer.echo(f"error: no case {key!r}", err=True)
        raise typer.Exit(2)
    typer.echo(json.dumps(asdict(check(case)), indent=1))


@app.command()
def gather(
    results: Annotated[list[Path], typer.Argument(help="what `sweep` wrote; of one case the last line counts")],
    out: Annotated[Path, typer.Option(help="one sorted file of them all")] = RESULTS,
) -> None:
    """Put the results of sweeps together; the file is written anew."""
    found = {key: row for path in results for key, row in read_results(path).items()}
    order = {library: index for index, library in enumerate(LIBRARIES)}
    rows = sorted(found.values(), key=lambda row: (order.get(row["key"].partition("/")[0], -1), row["key"]))
    out.write_text("".join(json.dumps(_rounded(row), separators=(",", ":")) + "\n" for row in rows))


@app.command()
def table(
    results: Annotated[Path, typer.Argument(help="what `sweep` or `gather` wrote")] = RESULTS,
    out: Annotated[Path, typer.Option(help="the Markdown file to write")] = COVERAGE,
) -> None:
    """Write the coverage table."""
    out.write_text(markdown(list(read_results(results).values())))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _versions(library: str) -> list[str]:
    packages = ["torch", library] if library in LIBRARIES[1:] else ["torch"]
    return [f"{package} {version(package)}" for package in packages]


def _wanted(
    cases: list[Case], only: str, done: dict[str, dict[str, Any]], redo: str, suffix: str = ""
) -> Iterator[Case]:
    for case in cases:
        status = done.get(case.key + suffix, {}).get("status", "")
        if fnmatch.fnmatch(case.key, only) and (not status or redo in ("all", status)):
            yield case


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


if __name__ == "__main__":
    app()
