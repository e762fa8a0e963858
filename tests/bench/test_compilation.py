"""Compilations of a bench: none is begun for which the time may not do."""

from __future__ import annotations

import json

import pytest
from torch import nn

from gapfx.bench.clock import OUT_OF_TIME, Stopwatch
from gapfx.bench.compilation import COMPILED, START_SECONDS, CompiledModel, reserved
from gapfx.bench.findings import What
from tests.runs import TASK, gapfx

START, SMALL, FORWARD, STEP = (
    "start of the compiler",
    "compilation of one op",
    "compilation of a forward",
    "compilation of a step",
)


def must_not_run() -> None:
    pytest.fail("it was compiled")


def a_watch(seconds: float, **longest: float) -> Stopwatch:
    """Where the compiler has been started, and took a second for one op."""
    return Stopwatch(seconds, longest={START: 5.0, SMALL: 1.0, **longest})


def a_model(num_layers: int) -> nn.Module:
    """Of two parameters a layer."""
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(num_layers)))


def test_the_compiler_is_not_started_when_it_may_take_longer_than_what_is_left() -> None:
    watch = Stopwatch(START_SECONDS - 1)
    assert CompiledModel(a_model(1), watch).ready(must_not_run, "forward") == OUT_OF_TIME
    assert watch.longest == {}


def test_a_large_model_is_not_compiled_in_a_time_that_does_for_a_small_one() -> None:
    def run() -> str:
        return "ran"

    small, large = (CompiledModel(a_model(number), a_watch(10)) for number in (4, 40))
    assert small.ready(must_not_run, "forward", spare=8) == OUT_OF_TIME
    assert large.ready(must_not_run, "forward") == OUT_OF_TIME
    assert small.ready(run, "forward") is run


@pytest.mark.parametrize(("what", "took"), [("forward", 12.0), ("step", 8.0)])
def test_what_a_compilation_took_is_expected_of_the_next_and_more_of_a_step(what: What, took: float) -> None:
    watch = a_watch(10, **{FORWARD: took})
    assert CompiledModel(a_model(1), watch).ready(must_not_run, what) == OUT_OF_TIME
    assert STEP not in watch.longest


def test_what_torch_says_of_a_model_that_it_cannot_compile_is_told() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler")

    model = CompiledModel(a_model(1), a_watch(60))
    assert model.ready(fails, "forward") == "RuntimeError: no compiler"


def test_time_is_reserved_for_compilations_only_where_the_compiler_can_be_started_in_it() -> None:
    assert reserved(Stopwatch(10), 10) == 0
    assert reserved(Stopwatch(60), 60) == 30
    assert reserved(a_watch(12), 12) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_forward_and_step_are_compiled_where_the_time_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("bench", TASK, "--seconds", 240, "--json") == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    of_compiled = {timing["what"]: timing for timing in timings if timing["way"] == COMPILED}
    assert set(of_compiled) == {"forward", "step"}
    assert all(timing["seconds"] > 0 for timing in of_compiled.values()), of_compiled
