"""The classes of layers of a model, each timed alone: forward, and forward with backward."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from gapfx.bench.clock import Run, Stopwatch
from gapfx.bench.findings import DENSE
from gapfx.bench.onnx_runtime import missing, session_of
from gapfx.calibration import Case
from gapfx.calibration.measure import Way, operands, step_of, ways_of
from gapfx.calibration.refusals import refusal
from gapfx.ops.convolution import ConvSettings
from gapfx.pattern import parse_pattern

BLOCKS = "block:4x1"
SECONDS = 0.3
LAYER = "layer"


def time_layers(watch: Stopwatch, cases: Iterable[Case], device: str, share: float) -> None:
    """The heaviest classes first, until `share` of the time is used."""
    counts = Counter(cases)
    heaviest = sorted(counts, key=lambda case: -case.work * counts[case])
    timings = [partial(_time, watch, case, counts[case], device) for case in heaviest]
    watch.begin_each(LAYER, timings, spare=watch.left * (1 - share))


def _time(watch: Stopwatch, case: Case, count: int, device: str) -> None:
    name = f"{'conv' if case.settings else 'linear'} {'x'.join(map(str, case.shape))} ({count} of them)"
    ways = _ways(case, device)
    x, gradient = operands(case, device)
    watch.time(name, "step", case.positions, {way: step_of(it, x, gradient) for way, it in ways.items()}, SECONDS)
    forwards = {way: _forward(it, x) for way, it in ways.items()}
    if device == "cpu" and case.dtype == "fp32":
        reason = missing()
        if reason:
            watch.miss(name, "forward", case.positions, "dense ONNX Runtime", reason)
        else:
            forwards["dense ONNX Runtime"] = session_of(_Dense(case, ways[DENSE].weight), (x.detach(),))
    watch.time(name, "forward", case.positions, forwards, SECONDS)


def _ways(case: Case, device: str) -> dict[str, Way]:
    ways = ways_of(case, device)
    if refusal(case):
        ways.pop("sparse", None)
    if case.pattern != BLOCKS and "sparse" in ways and parse_pattern(BLOCKS).refusal(case.shape) is None:
        ways["sparse 4x1"] = ways_of(dataclasses.replace(case, pattern=BLOCKS), device)["sparse"]
    return ways


def _forward(way: Way, x: Tensor) -> Run:
    given = x.detach()

    def forward() -> object:
        with torch.no_grad():
            return way.layer(given)

    return forward


class _Dense(nn.Module):
    """The dense layer of a case, as ONNX takes it."""

    def __init__(self, case: Case, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.settings = nn.Parameter(weight.detach()), case.settings

    def forward(self, x: Tensor) -> Tensor:
        """As torch's linear layer or convolution."""
        if not self.settings:
            return nn.functional.linear(x, self.weight)
        given = ConvSettings.from_ints(self.settings)
        function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.weight.dim() - 3]
        return function(x, self.weight, None, given.stride, given.padding, given.dilation, given.groups)
