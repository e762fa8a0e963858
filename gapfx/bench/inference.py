"""The whole model of a finished run at a few batch sizes: dense in each way, and loaded with its live values."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from gapfx.bench.clock import LEAST_CALLS, OUT_OF_TIME, Run, Stopwatch
from gapfx.bench.compilation import COMPILED, CompiledModel
from gapfx.bench.deployed import HELD, Deployed, is_sparse_linear, kernel_of
from gapfx.bench.findings import DENSE, Timing
from gapfx.bench.forwards import EXPORT, Inputs, at_batch, forward_of, in_bf16, session_or_reason
from gapfx.bench.verdict import MODEL
from gapfx.kernels.decode import MAX_TOKENS, Values

BATCHES = (1, 8, 64)
BF16, ONNX = "dense bf16", "dense ONNX Runtime"
TOO_MANY_TOKENS = f"int8 values are for up to {MAX_TOKENS} tokens"
NO_LINEAR = "no linear layer is held by its live values"


class ModelTimer:
    """Times forwards of a run's model; a model that is compiled is kept between threads and batches."""

    def __init__(self, deployed: Deployed, watch: Stopwatch) -> None:
        self.deployed, self.watch = deployed, watch
        self.bf16 = copy.deepcopy(deployed.dense).bfloat16()
        self.compiled = CompiledModel(copy.deepcopy(deployed.dense), watch)

    @property
    def sizes(self) -> list[int]:
        """Batches, small ones first; 0 stands for what the task gives when its batch is not known."""
        own = self.deployed.batch
        return sorted({*BATCHES, own}) if own else [0]

    def time(self, share: float) -> None:
        """All ways in turn but torch.compile, until `share` of the time that is left is used."""
        watch = self.watch
        stop = watch.left * (1 - share)
        for index, batch in enumerate(self.sizes):
            ways = (DENSE, BF16, ONNX, *(f"sparse {values}" for values in HELD))
            left = watch.left - stop
            if self._least_seconds(batch) * len(ways) > left:
                watch.timings += [self._row(way, batch, OUT_OF_TIME) for way in ways]
            else:
                self._time(batch, self._runs(batch, stop), left / (len(self.sizes) - index))

    def time_compiled(self, share: float) -> None:
        """The dense model under torch.compile. After all else: nothing breaks a compilation off."""
        watch = self.watch
        stop = watch.left * (1 - share)
        for index, batch in enumerate(self.sizes):
            forward = forward_of(self.compiled.model, at_batch(self.deployed.inputs, batch))
            run = self.compiled.ready(forward, "forward", stop + self._least_seconds(batch))
            self._time(batch, {COMPILED: run}, (watch.left - stop) / (len(self.sizes) - index))

    def _least_seconds(self, batch: int) -> float:
        """What timing one way takes, going by the task's own batch."""
        samples = batch / self.deployed.batch if batch else 1.0
        return samples * self.deployed.seconds * (LEAST_CALLS + 1)

    def _time(self, batch: int, runs: Mapping[str, Run | str], seconds: float) -> None:
        self.watch.timings += [self._row(way, batch, run) for way, run in runs.items() if isinstance(run, str)]
        able = {self._row(way, batch): run for way, run in runs.items() if not isinstance(run, str)}
        self.watch.time_rows(able, max(0.0, seconds))

    def _row(self, way: str, batch: int, reason: str = "") -> Timing:
        deployed = self.deployed
        positions = {weight.fqn: deployed.positions(weight, batch) for weight in deployed.weights}
        values: Any = way.removeprefix("sparse ")
        kernel = ""
        if values in deployed.loaded and not reason:
            served = Counter(kernel_of(deployed.loaded[values], fqn, number) for fqn, number in positions.items())
            kernel = ", ".join(f"{name} {number}" for name, number in served.most_common())
        most, threads = max(positions.values(), default=batch), torch.get_num_threads()
        return Timing(MODEL, "forward", way, threads, most, reason=reason, batch=batch, kernel=kernel)

    def _runs(self, batch: int, spare: float) -> dict[str, Run | str]:
        """Way -> what to time, or why it cannot be; `spare` is the time that an export has to leave."""
        deployed, inputs = self.deployed, at_batch(self.deployed.inputs, batch)
        runs: dict[str, Run | str] = {
            DENSE: forward_of(deployed.dense, inputs),
            BF16: forward_of(self.bf16, in_bf16(inputs)),
            ONNX: self.watch.begin(EXPORT, partial(session_or_reason, deployed.dense, inputs), spare=spare),
        }
        return runs | {f"sparse {values}": self._sparse(values, inputs, batch) for values in HELD}

    def _sparse(self, values: Values, inputs: Inputs, batch: int) -> Run | str:
        deployed = self.deployed
        if values not in deployed.loaded:
            return OUT_OF_TIME if any(map(is_sparse_linear, deployed.weights)) else NO_LINEAR
        tokens = (deployed.positions(weight, batch) for weight in deployed.weights if is_sparse_linear(weight))
        # One layer with few tokens is enough: the head of a classifier, say.
        if values == "int8" and min(tokens) > MAX_TOKENS:
            return TOO_MANY_TOKENS
        return forward_of(deployed.loaded[values].module, inputs)
