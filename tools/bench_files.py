"""Sizes and times of sparse files of trained runs beside dense safetensors: `python tools/bench_files.py RUN...`.

For each run, in fp32 as it was trained and rounded to bf16: size of the safetensors file, of the sparse file, and of
the sparse file with compressed values, of the whole model and of its sparse weights alone. Time to save and to load
each: medians of turns that alternate. A load gives all tensors dense, in memory of their own, and reads every byte;
files lie in the page cache. Masks are those of the run, so a live weight that is 0 stays live.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import gapfx
from gapfx.run_dir import RunDir
from gapfx.text import table_text

MIB = 2**20


@dataclass(frozen=True)
class Form:
    """One way to hold a model in a file."""

    name: str
    save: Callable[[Path], object]
    load: Callable[[Path], object]


def forms(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[Form, ...]:
    """Dense, sparse, and sparse with compressed values."""

    def sparse(path: Path, *, compress: bool) -> None:
        gapfx.save_sparse(tensors, path, masks=masks, compress=compress)

    return (
        Form("safetensors", lambda path: save_file(tensors, path), read_dense),
        Form("sparse", lambda path: sparse(path, compress=False), gapfx.load_sparse),
        Form("compressed", lambda path: sparse(path, compress=True), gapfx.load_sparse),
    )


def read_dense(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, copied out of the mapping."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def rows_of(run: Path, turns: int) -> Iterator[list[str]]:
    """A row for each dtype and form."""
    trained, masks = load_file(RunDir(run).model), gapfx.load_masks(RunDir(run).sparse)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in trained.items()}
        alone = {key: tensor for key, tensor in tensors.items() if key in masks}
        yield from _rows(f"{run.name}, {1 - kept:.1%}, {name}", forms(tensors, masks), forms(alone, masks), turns)


def size_of(way: Form) -> int:
    """Bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        way.save(Path(folder) / "file")
        return (Path(folder) / "file").stat().st_size


def _rows(label: str, ways: tuple[Form, ...], alone: tuple[Form, ...], turns: int) -> Iterator[list[str]]:
    of_weights = [size_of(way) for way in alone]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / way.name for way in ways]
        saves: list[list[float]] = [[] for _ in ways]
        loads: list[list[float]] = [[] for _ in ways]
        for _ in range(turns):
            for number, (way, path) in enumerate(zip(ways, paths, strict=True)):
                saves[number].append(timed(lambda way=way, path=path: way.save(path)))
                loads[number].append(timed(lambda way=way, path=path: way.load(path)))
        dense = paths[0].stat().st_size
        for way, path, weights, save, load in zip(ways, paths, of_weights, saves, loads, strict=True):
            size = path.stat().st_size
            times = [f"{1e3 * statistics.median(each):.1f}" for each in (save, load)]
            smaller = [f"{dense / size:.2f}", f"{of_weights[0] / weights:.2f}"]
            yield [label, way.name, f"{size / MIB:.3f}", *smaller, *times]


def main(runs: Annotated[list[Path], typer.Argument(help="Finished run directories.")], turns: int = 5) -> None:
    """Print the table."""
    rows = [row for run in runs for row in rows_of(run, turns)]
    head = ["run", "file", "MiB", "times smaller", "sparse weights alone", "save, ms", "load, ms"]
    print(table_text(head, rows, right=set(range(2, len(head)))))


if __name__ == "__main__":
    typer.run(main)
