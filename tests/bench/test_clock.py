"""The time of a bench: what is begun in what is left of it."""

from __future__ import annotations

import time
from functools import partial

import pytest

from gapfx.bench.clock import OUT_OF_TIME, Stopwatch


def did_run() -> str:
    return "done"


def must_not_run() -> str:
    pytest.fail("it ran")


def test_nothing_is_begun_that_took_longer_before_than_what_is_left() -> None:
    watch = Stopwatch(60)
    assert watch.begin("a walk", did_run) == "done"
    watch.longest["a walk"] = 61.0
    assert watch.begin("a walk", must_not_run) == OUT_OF_TIME
    assert watch.begin("a ride", did_run) == "done"


def test_the_first_of_a_kind_goes_by_the_estimate_and_the_next_by_what_it_took() -> None:
    watch = Stopwatch(60)
    assert watch.begin("a walk", must_not_run, estimate=61) == OUT_OF_TIME
    assert watch.begin("a walk", did_run, estimate=50) == "done"
    assert watch.longest["a walk"] < 50
    assert watch.begin("a walk", did_run, estimate=61) == "done"


def test_time_that_is_spared_for_others_is_not_begun_in() -> None:
    watch = Stopwatch(60)
    assert watch.begin("a walk", must_not_run, estimate=20, spare=50) == OUT_OF_TIME
    assert watch.begin("a walk", did_run, estimate=20, spare=30) == "done"


def test_what_is_left_out_is_counted_in_a_note() -> None:
    watch = Stopwatch(60)
    watch.begin_each("walk", [did_run, partial(watch.longest.update, walk=61.0), must_not_run, must_not_run])
    assert watch.notes == [f"2 of 4 timings of a walk: {OUT_OF_TIME}"]


def test_a_way_whose_calls_would_not_fit_is_not_called_again() -> None:
    calls: list[float] = []

    def slow() -> None:
        calls.append(time.monotonic())
        time.sleep(0.2)

    watch = Stopwatch(0.6)
    watch.time("a layer", "step", 8, {"dense": lambda: None, "sparse": slow}, 10)
    assert len(calls) == 1
    assert {timing.way: timing.reason for timing in watch.timings} == {"dense": "", "sparse": OUT_OF_TIME}


def test_rounds_end_when_the_time_is_up() -> None:
    ends: list[float] = []

    def busy() -> None:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        ends.append(end)

    watch = Stopwatch(1.0)
    watch.time("a layer", "step", 8, {"dense": busy}, 10)
    assert watch.timings[0].seconds > 0
    assert len(ends) <= 10
