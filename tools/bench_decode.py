"""Decode: few tokens through a stack of sparse linear layers that is larger than the caches, against torch.

    python tools/bench_decode.py
    python tools/bench_decode.py --tokens 8 --pairs 12
    GAPFX_NATIVE=avx2 python tools/bench_decode.py

One thread, process CPU time, interleaved rounds, medians. Each line is a sparsity, each column a kernel: how many times
faster than torch's fp32 linear layers of the same shapes. Without AVX-512 nothing goes by masks: those kernels then
show what it takes to make the numbers of live columns at each call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from gapfx.kernels import decode, native
from gapfx.masks import pack

Stack = list[decode.DecodeLayout]
KERNELS: tuple[tuple[str, int, decode.Values], ...] = (
    ("fp32 mask", 16, "fp32"),
    ("fp32 columns", 1, "fp32"),
    ("bf16 mask", 16, "bf16"),
    ("bf16 columns", 1, "bf16"),
    ("int8 mask", 16, "int8"),
    ("int8 columns", 1, "int8"),
)


def layers(shapes: list[tuple[int, int]], sparsity: float, by_number_from: int, values: decode.Values) -> Stack:
    """A layout for each shape, with random masks and values."""
    return [_layer(shape, sparsity, by_number_from, values) for shape in shapes]


def _layer(shape: tuple[int, int], sparsity: float, by_number_from: int, values: decode.Values) -> decode.DecodeLayout:
    mask = torch.rand(shape) >= sparsity
    live, bits = torch.randn(int(mask.sum())), pack(mask)
    if values == "int8":
        live, scales = decode.quantised(live, mask)
        return decode.prepare(live, mask, bits, scales=scales, by_number_from=by_number_from)
    return decode.prepare(live.bfloat16() if values == "bf16" else live, mask, bits, by_number_from=by_number_from)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of process CPU time of each call, in turn."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            took[name].append(time.process_time() - began)
    return {name: statistics.median(times[1:]) for name, times in took.items()}


def _run(stack: Stack, inputs: dict[int, Tensor]) -> None:
    for layout in stack:
        decode.product(inputs[layout.shape[1]], layout, None)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens, 1 to 15.")] = 1,
    width: Annotated[int, typer.Option(help="Width; layers are width x 4 width and back.")] = 768,
    pairs: Annotated[int, typer.Option(help="Pairs of layers.")] = 12,
    rounds: Annotated[int, typer.Option(help="Rounds of each measurement.")] = 7,
) -> None:
    """Print a line for each sparsity."""
    print(f"kernels: {native.level()}")
    torch.set_num_threads(1)
    shapes = [(4 * width, width), (width, 4 * width)] * pairs
    inputs = {size: torch.randn(tokens, size) for size in (width, 4 * width)}
    dense = [torch.randn(shape) for shape in shapes]
    for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95):
        calls: dict[str, Callable[[], object]] = {"torch": lambda: [F.linear(inputs[w.shape[1]], w) for w in dense]}
        for name, first, values in KERNELS:
            calls[name] = partial(_run, layers(shapes, sparsity, first, values), inputs)
        took = medians(calls, rounds)
        ratios = ", ".join(f"{name} {took['torch'] / seconds:.2f}" for name, seconds in took.items())
        print(f"{sparsity:.0%}, {tokens} tokens, torch {took['torch'] * 1e3:.1f} ms: {ratios}", flush=True)


if __name__ == "__main__":
    typer.run(main)
