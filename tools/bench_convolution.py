"""Times sparse convolutions against the best of torch's dense ones: `python tools/bench_convolution.py --batch 8`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from gapfx.masks import pack
from gapfx.ops.convolution import ConvSettings
from gapfx.ops.sparse_convolution import sparse_convolution

# Inputs, outputs, kernel, side, stride: as in ResNet-50.
SHAPES = {
    "1x1 256-64 @56": (256, 64, 1, 56, 1),
    "1x1 512-128 @28": (512, 128, 1, 28, 1),
    "1x1 1024-256 @14": (1024, 256, 1, 14, 1),
    "1x1 512-2048 @7": (512, 2048, 1, 7, 1),
    "3x3 64 @56": (64, 64, 3, 56, 1),
    "3x3 128 @28": (128, 128, 3, 28, 1),
    "3x3 256 @14": (256, 256, 3, 14, 1),
    "3x3 512 @7": (512, 512, 3, 7, 1),
    "3x3 128 @56 stride 2": (128, 128, 3, 56, 2),
    "1x1 256-512 @56 stride 2": (256, 512, 1, 56, 2),
}
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One convolution, dense and sparse, ready to run."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    stride: int

    @property
    def padding(self) -> int:
        """Half of the kernel: the side stays."""
        return self.weight.shape[-1] // 2

    def dense(self, memory_format: torch.memory_format, is_training: bool) -> Run:
        """torch's, in a memory format."""
        x = self.x.contiguous(memory_format=memory_format).requires_grad_(is_training)
        weight = self.weight.contiguous(memory_format=memory_format).requires_grad_(is_training)
        return _run(lambda: F.conv2d(x, weight, None, self.stride, self.padding), [x, weight], is_training)

    def sparse(self, is_training: bool) -> Run:
        """Ours."""
        each = (self.stride,) * 2, (self.padding,) * 2, (1, 1), (0, 0)
        settings, shape, bits = ConvSettings(*each).to_ints(), self.weight.shape, pack(self.mask)
        x = self.x.clone().requires_grad_(is_training)
        values = self.weight[self.mask].view(-1, 1).requires_grad_(is_training)
        return _run(lambda: sparse_convolution(x, values, bits, None, shape, settings), [x, values], is_training)


def _run(forward: Callable[[], Tensor], leaves: Sequence[Tensor], is_training: bool) -> Run:
    if not is_training:
        return forward
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, gradient)


def a_case(name: str, batch: int, sparsity: float, rows: int) -> Case:
    """Bernoulli mask, in blocks of `rows` outputs."""
    inputs, outputs, kernel, side, stride = SHAPES[name]
    kept = torch.rand(outputs // rows, inputs, kernel, kernel) >= sparsity
    mask = kept.repeat_interleave(rows, 0)
    return Case(torch.randn(batch, inputs, side, side), torch.randn(mask.shape) * mask, mask, stride)


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds of process CPU time a call, of interleaved rounds of 4 ms or more."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    times = {name: max(1, int(0.004 / seconds(run, 1))) for name, run in runs.items() if seconds(run, 1) > 0}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run, times[name]))
    return {name: statistics.median(each) for name, each in took.items()}


def seconds(run: Run, times: int) -> float:
    """Of one call, on average."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def main(
    batch: Annotated[int, typer.Option(help="Images.")] = 1,
    training: Annotated[bool, typer.Option("--training", help="Forward and backward.")] = False,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, of which the median counts.")] = 7,
    rows: Annotated[int, typer.Option(help="Outputs that share their live weights.")] = 1,
    only: Annotated[str, typer.Option(help="Part of the names of the shapes.")] = "",
) -> None:
    """Prints how many times faster than the faster of torch's two memory formats, on one thread."""
    torch.set_num_threads(1)
    for name in (name for name in SHAPES if only in name):
        for sparsity in (0.8, 0.9, 0.95):
            case = a_case(name, batch, sparsity, rows)
            formats = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
            runs = {key: case.dense(value, training) for key, value in formats.items()}
            took = medians({**runs, "sparse": case.sparse(training)}, rounds)
            best = min(took[key] for key in formats)
            work = 2 * took["sparse"] * 1e9
            flops = int(case.mask.sum()) * batch * (case.x.shape[-1] // case.stride) ** 2 * (3 if training else 1)
            typer.echo(
                f"{name:26} {sparsity:.0%}: dense {best * 1e3:8.3f} ms, sparse {took['sparse'] * 1e3:8.3f} ms, "
                f"{best / took['sparse']:5.2f}x, {flops * 4 / work:5.1f} GF/s"
            )


if __name__ == "__main__":
    typer.run(main)
