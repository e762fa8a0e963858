"""Runs a task with several methods, sparsities and seeds at equal epochs, and prints a table of the final metric.

    python tools/methods_table.py examples/fashion.py --out runs/methods --parallel 2

A run that is already finished is taken as it is, so that an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Cell:
    """One run: a method at a sparsity with a seed. A dense run has sparsity 0."""

    method: str
    sparsity: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Where its run directory is."""
        return out / f"{self.method}-{self.sparsity:g}-{self.seed}"


def cells(methods: list[str], sparsities: list[float], num_seeds: int) -> list[Cell]:
    """Every run of the table; dense once a seed, whatever the sparsities."""
    kinds = [(method, 0.0 if method == "dense" else sparsity) for method in methods for sparsity in sparsities]
    return [Cell(*kind, seed) for seed in range(num_seeds) for kind in dict.fromkeys(kinds)]


def train(task: Path, cell: Cell, out: Path, flags: list[str]) -> None:
    """Run one cell on one thread unless it is there; raises CalledProcessError with the message of a failed run."""
    folder = cell.folder(out)
    if (folder / "summary.json").is_file():
        return
    arguments = ["--method", cell.method, "--sparsity", str(cell.sparsity), "--seed", str(cell.seed), *flags]
    resume = ["--resume"] if (folder / "config.json").is_file() else []
    command = [sys.executable, "-m", "gapfx", "sparsify", str(task), "--out", str(folder), *arguments, *resume]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    typer.echo(f"{folder.name} done", err=True)


def table(finished: Iterable[tuple[Cell, dict[str, Any]]], metric: str) -> str:
    """Markdown: a row a method and sparsity, with mean, standard deviation and the values by seed."""
    values: dict[tuple[str, float], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, float], list[float]] = defaultdict(list)
    for cell, summary in finished:
        values[cell.method, cell.sparsity].append(summary["metrics"]["final"][metric])
        seconds[cell.method, cell.sparsity].append(summary["seconds"])
    lines = [f"| method | sparsity | {metric}, mean | sd | by seed | seconds |", "|---|---|---|---|---|---|"]
    for (method, sparsity), found in sorted(values.items(), key=lambda item: (item[0][1], item[0][0])):
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        each = ", ".join(f"{value:.4f}" for value in found)
        took = statistics.median(seconds[method, sparsity])
        lines.append(f"| {method} | {sparsity:g} | {statistics.mean(found):.4f} | {spread:.4f} | {each} | {took:.0f} |")
    return "\n".join(lines)


def main(
    task: Path,
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs/methods"),
    methods: Annotated[str, typer.Option(help="Methods, split by commas.")] = "dense,static,oneshot,gap",
    sparsities: Annotated[str, typer.Option(help="Sparsities, split by commas.")] = "0.8,0.9",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    metric: Annotated[str, typer.Option(help="Which metric of evaluate().")] = "accuracy",
    parallel: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    flags: Annotated[str, typer.Option(help="More flags for every run.")] = "",
) -> None:
    """Train what is missing and print the table."""
    wanted = cells(methods.split(","), [float(text) for text in sparsities.split(",")], seeds)
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda cell: train(task, cell, out, flags.split()), wanted))
    finished = [(cell, json.loads((cell.folder(out) / "summary.json").read_text())) for cell in wanted]
    typer.echo(table(finished, metric))


if __name__ == "__main__":
    typer.run(main)
