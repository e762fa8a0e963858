"""Times one case with random numbers: forward and backward, the ways in turn, so that a busy machine slows all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.calibration.cases import DTYPES, Case, Times
from gapfx.calibration.refusals import refusal
from gapfx.masks import pack
from gapfx.ops.convolution import ConvSettings, convolution
from gapfx.ops.linear import linear
from gapfx.ops.sparse_convolution import sparse_convolution
from gapfx.ops.sparse_linear import sparse_linear
from gapfx.pattern import parse_pattern

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
SHORTEST_SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Way:
    """A layer that runs a case, and the parameter that it trains."""

    layer: Callable[[Tensor], Tensor]
    weight: nn.Parameter


def measure(case: Case, *, seconds: float = 0.15, device: str = "cpu") -> Times:
    """Medians of interleaved rounds for about `seconds`. No random number of torch's own generator is drawn."""
    x, out = operands(case, device)
    ways = ways_of(case, device)
    if refusal(case):
        ways.pop("sparse", None)
    medians = interleaved({name: step_of(way, x, out) for name, way in ways.items()}, seconds)
    return Times(medians["dense"], medians["expand"], medians.get("sparse"))


def operands(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """A random input that wants a gradient, and the gradient of the output."""
    dtype, generator = DTYPES[case.dtype], torch.Generator().manual_seed(0)
    x = torch.randn(case.input_shape, generator=generator).to(device, dtype)
    sizes = (case.sizes[0], case.shape[0], *case.sizes[1:]) if case.settings else (*case.sizes, case.shape[0])
    return x.requires_grad_(), torch.randn(sizes, generator=generator).to(device, dtype)


def ways_of(case: Case, device: str) -> dict[str, Way]:
    """The layer with a dense weight, with live values that are made dense, and with kernels that skip zeros."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(case.shape, generator=generator)
    mask = parse_pattern(case.pattern).mask(torch.rand(case.shape, generator=generator), case.sparsity)
    dense = nn.Parameter(weight.to(device, DTYPES[case.dtype]))
    values = nn.Parameter(weight[mask].view(-1, 1).to(device, DTYPES[case.dtype]))
    bits = pack(mask).to(device)
    given = (values, bits, None, case.shape)
    if not case.settings:
        return {
            "dense": Way(lambda x: F.linear(x, dense), dense),
            "expand": Way(lambda x: linear(x, *given), values),
            "sparse": Way(lambda x: sparse_linear(x, *given), values),
        }
    arguments = ConvSettings.from_ints(case.settings).arguments()
    return {
        "dense": Way(lambda x: torch.convolution(x, dense, None, *arguments), dense),
        "expand": Way(lambda x: convolution(x, *given, case.settings), values),
        "sparse": Way(lambda x: sparse_convolution(x, *given, case.settings), values),
    }


def step_of(way: Way, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    """One forward and backward, which adds nothing to `.grad`."""
    return lambda: torch.autograd.grad(way.layer(x), (x, way.weight), gradient)


def interleaved(runs: dict[str, Callable[[], object]], seconds: float, *, settles: bool = False) -> dict[str, float]:
    """Median seconds of one call of each, taken in turns, at most about `seconds` in all after one call of each.

    With `settles` a call that is not timed comes before each that is: it finds caches as its own kind leaves them, as a
    model does that is called again and again, not as the others do.
    """
    single = {name: _seconds(run, 1) for name, run in runs.items()}  # the first call prepares
    single = {name: min(_seconds(run, 1), single[name]) for name, run in runs.items()}
    repeats = {name: max(1, round(SHORTEST_SAMPLE_SECONDS / max(once, 1e-7))) for name, once in single.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for index in range(MOST_ROUNDS):
        if index >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            if settles:
                run()
            samples[name].append(_seconds(run, repeats[name]))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call. On one thread those of the process, which others on the machine do not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    began = clock()
    for _ in range(repeats):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - began) / repeats
