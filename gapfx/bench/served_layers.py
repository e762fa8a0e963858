"""The layers of a finished run, each timed alone: dense, and loaded with its live values."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import torch
from torch import nn

from gapfx.bench.clock import Run, Stopwatch
from gapfx.bench.deployed import Deployed, home_of, is_sparse_linear, kernel_of
from gapfx.bench.findings import DENSE, Timing
from gapfx.bench.forwards import Inputs, forward_of, session_or_reason
from gapfx.bench.inference import ONNX
from gapfx.bench.layers import LAYER
from gapfx.kernels.decode import MAX_TOKENS
from gapfx.loading import ServedWeight

TOKENS = (1, 8, 64, 512)
SECONDS = 0.3
Class = tuple[str, tuple[int, ...], str, float]


def time_served(deployed: Deployed, watch: Stopwatch, share: float) -> None:
    """The heaviest classes first, until `share` of the time is used.

    Linear layers at 1 to 512 tokens, others with what they are given in the task's batch.
    """
    shown = {_class(deployed, weight): weight for weight in reversed(deployed.weights)}
    counts = Counter(_class(deployed, weight) for weight in deployed.weights)
    timings: list[Run] = []
    for key in sorted(shown, key=lambda key: -math.prod(shown[key].shape) * counts[key]):
        weight, kind = shown[key], key[0].lower()
        name = f"{kind} {'x'.join(map(str, weight.shape))} at {weight.sparsity:.0%} ({counts[key]} of them)"
        for positions, inputs in _inputs(deployed, weight).items():
            timings.append(partial(_time, deployed, watch, weight, name, positions, inputs))
    watch.begin_each(LAYER, timings, spare=watch.left * (1 - share))


def _class(deployed: Deployed, weight: ServedWeight) -> Class:
    module = deployed.dense.get_submodule(home_of(weight.fqn))
    return type(module).__name__, weight.shape, weight.use, round(weight.sparsity, 2)


def _inputs(deployed: Deployed, weight: ServedWeight) -> dict[int, Inputs]:
    """Positions -> what the layer is given."""
    home = home_of(weight.fqn)
    module, call = deployed.dense.get_submodule(home), deployed.calls.get(home)
    if call is None:
        return {}  # another module reads the weight
    if isinstance(module, nn.Linear):
        return {n: ((torch.randn(n, module.in_features).to(module.weight.dtype),), {}) for n in TOKENS}
    return {call.positions: call.inputs}


def _time(
    deployed: Deployed, watch: Stopwatch, weight: ServedWeight, name: str, positions: int, inputs: Inputs
) -> None:
    home, threads = home_of(weight.fqn), torch.get_num_threads()

    def row(way: str, kernel: str = "", reason: str = "") -> Timing:
        return Timing(name, "forward", way, threads, positions, reason=reason, kernel=kernel)

    dense = deployed.dense.get_submodule(home)
    runs: dict[Timing, Run] = {row(DENSE): forward_of(dense, inputs)}
    session = session_or_reason(dense, inputs)
    if isinstance(session, str):
        watch.timings.append(row(ONNX, reason=session))
    else:
        runs[row(ONNX)] = session
    for values, loaded in deployed.loaded.items():
        is_served = values == "fp32" or (is_sparse_linear(weight) and (values == "bf16" or positions <= MAX_TOKENS))
        if is_served:
            kernel = kernel_of(loaded, weight.fqn, positions)
            runs[row(f"sparse {values}", kernel)] = forward_of(loaded.module.get_submodule(home), inputs)
    watch.time_rows(runs, SECONDS)
