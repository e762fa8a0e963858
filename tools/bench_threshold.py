"""Times the exact threshold of many scores beside `abs` and `kthvalue`: `bench_threshold.py --numel 1e8`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from gapfx.pattern import top_mask
from gapfx.threshold import Keys


def kthvalue(weight: Tensor, num_kept: int) -> float:
    """The threshold as torch finds it."""
    return weight.abs().kthvalue(weight.numel() - num_kept + 1).values.item()


def histograms(weight: Tensor, num_kept: int) -> int:
    """The threshold's key."""
    return Keys.of(weight.abs()).threshold(num_kept).key


def seconds(run: Callable[[], object]) -> float:
    """Process CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main(
    numel: Annotated[float, typer.Option(help="How many weights.")] = 1e7,
    sparsity: Annotated[float, typer.Option(help="Share of zeros.")] = 0.8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, of which the median counts.")] = 3,
) -> None:
    """Prints nanoseconds a weight, on one thread."""
    torch.set_num_threads(1)
    weight, kept = torch.randn(int(numel)), round(int(numel) * (1 - sparsity))
    runs: dict[str, Callable[[], object]] = {
        "abs + kthvalue": lambda: kthvalue(weight, kept),
        "abs + histograms": lambda: histograms(weight, kept),
        "histograms": lambda: Keys.of(weight).threshold(kept),
        "top_mask, with NaN check and mask": lambda: top_mask(weight, kept),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run))
    base = statistics.median(took["abs + kthvalue"])
    for name, times in took.items():
        middle = statistics.median(times)
        typer.echo(f"{name:34} {middle / numel * 1e9:7.2f} ns a weight, {base / middle:5.1f}x")


if __name__ == "__main__":
    typer.run(main)
