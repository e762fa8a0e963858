"""torch.compile within a time limit: nothing breaks a compilation off, so none begins for which the time may not do."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from gapfx.bench.clock import Run, Stopwatch, reason_of
from gapfx.bench.findings import What

COMPILED = "dense torch.compile"
# The first compilation of a process loads the compiler: 9 to 12 s on an idle machine of two cores, up to 20 s on a busy
# one.
START_SECONDS = 20.0
# For each parameter of a model, in compilations of a function of one op: 0.2 to 0.45 were measured of forwards, 0.33 to
# 0.74 of training steps, with an empty cache.
PER_PARAMETER: dict[What, float] = {"forward": 0.6, "step": 0.85}
# Of what the forward took: the backward is compiled too.
STEP = 1.5
# Of the time, for compilations, which come last.
SHARE = 0.5
_START, _SMALL = "start of the compiler", "compilation of one op"


def reserved(watch: Stopwatch, seconds: float) -> float:
    """What of `seconds` to leave for compilations; nothing where not even the compiler could be started in it."""
    return SHARE * seconds if SHARE * seconds > watch.longest.get(_START, START_SECONDS) else 0.0


class CompiledModel:
    """A model that torch compiles when it is first called, if the time may do for it."""

    def __init__(self, model: nn.Module, watch: Stopwatch) -> None:
        self.model, self.watch, self.has_compiler = model, watch, False

    def ready(self, run: Run, what: What, spare: float = 0.0) -> Run | str:
        """`run`, which calls the model, after a first call that compiles it; or why there is none.

        `spare` is the time that has to be left after it.
        """
        reason = _start(self.model, self.watch, spare) if _SMALL not in self.watch.longest else ""
        if reason:
            return reason
        estimate = self._seconds(what)
        return self.watch.begin(_kind(what), lambda: self._called(run), estimate=estimate, spare=spare)

    def _seconds(self, what: What) -> float:
        """What a first compilation should take."""
        of_size = PER_PARAMETER[what] * self.watch.longest[_SMALL] * sum(1 for _ in self.model.parameters())
        forward = self.watch.longest.get(_kind("forward"), 0.0)
        return max(of_size, STEP * forward if what == "step" else 0.0)

    def _called(self, run: Run) -> Run | str:
        if not self.has_compiler:  # only now, as this loads the compiler
            self.model.compile()
            self.has_compiler = True
        try:
            run()
        except Exception as error:
            return reason_of(error)
        return run


def _start(model: nn.Module, watch: Stopwatch, spare: float) -> str:
    """Start the compiler, and see how fast it is here; why not, or ""."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def start() -> str:
        try:
            _compile_one_op(device)
            watch.keep(_SMALL, lambda: _compile_one_op(device))
        except Exception as error:
            return reason_of(error)
        return ""

    return watch.begin(_START, start, estimate=START_SECONDS, spare=spare)


def _compile_one_op(device: torch.device) -> object:
    def double(x: Tensor) -> Tensor:
        return x * 2

    # Of a size that no cache holds, as it may hold nothing of the model.
    return torch.compile(double, dynamic=False)(torch.ones(time.time_ns() % 2**20 + 1, device=device))


def _kind(what: What) -> str:
    return f"compilation of a {what}"
