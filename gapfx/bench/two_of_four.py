"""2:4 on CUDA: linear layers in torch's semi-structured format beside dense ones, or why they are not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.bench.clock import Run, Stopwatch
from gapfx.bench.findings import DENSE
from gapfx.bench.layers import LAYER
from gapfx.pattern import parse_pattern
from gapfx.plan import Weight
from gapfx.two_of_four import DTYPES, PATTERN, device_refusal, packed, shape_refusal

SECONDS = 0.3


def refusal(patterns: Iterable[str], capability: tuple[int, int] | None) -> str:
    """Why 2:4 is not timed with a plan of these patterns on a device; "" when it is. `capability` is None on a CPU."""
    if capability is None:
        return "2:4 is for CUDA devices: not timed"
    if PATTERN not in patterns:
        return f"2:4: not timed, no weight of the plan has it; give --pattern {PATTERN}"
    reason = device_refusal(capability)
    return f"{reason}: not timed" if reason else ""


def time_two_of_four(weights: Iterable[Weight], watch: Stopwatch, tokens: Iterable[int], share: float) -> None:
    """Forwards of each class of 2:4 weights on CUDA, in bf16 and fp16, the largest first, for `share` of the time."""
    counts = Counter(weight.shape for weight in weights if weight.pattern == PATTERN)
    sizes, timings = tuple(tokens), list[Run]()
    for shape in sorted(counts, key=lambda shape: -shape[0] * counts[shape]):
        name = f"linear {'x'.join(map(str, shape))} ({counts[shape]} of them)"
        reason = shape_refusal(shape)
        if reason:
            watch.miss(name, "forward", 0, PATTERN, reason)
            continue
        timings += [
            partial(_time, watch, f"{name} in {dtype}", shape, number, dtype) for number in sizes for dtype in DTYPES
        ]
    watch.begin_each(LAYER, timings, spare=watch.left * (1 - share))


def _time(watch: Stopwatch, name: str, shape: tuple[int, ...], tokens: int, dtype: str) -> None:
    try:
        runs = forwards(shape, tokens, dtype)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # of a build of torch without the kernels, or a device that they do not know
        watch.miss(name, "forward", tokens, PATTERN, f"torch refuses it: {error}".splitlines()[0][:120])
        return
    watch.time(name, "forward", tokens, runs, SECONDS)


def forwards(shape: tuple[int, ...], tokens: int, dtype: str) -> dict[str, Run]:
    """The same random 2:4 weight, dense and semi-structured, on CUDA. Raises what torch raises where it cannot."""
    weight = torch.randn(shape)
    weight = (weight * parse_pattern(PATTERN).mask(weight.abs(), 0.5)).to("cuda", DTYPES[dtype])
    x = torch.randn(tokens, shape[1]).to(weight)
    return {DENSE: _product(x, weight), PATTERN: _product(x, packed(weight))}


def _product(x: Tensor, weight: Tensor) -> Run:
    def product() -> object:
        with torch.no_grad():
            return F.linear(x, weight)

    return product
