"""Pausing the garbage collector around work that makes many small objects."""

from __future__ import annotations

import gc

import pytest

from gapfx.capture.state import collector_paused


def test_the_collector_is_off_meanwhile_and_on_afterwards() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_nested_pauses_end_with_the_outer_one() -> None:
    with collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off_also_after_an_error() -> None:
    gc.disable()
    try:
        with pytest.raises(KeyError), collector_paused():
            raise KeyError
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_meanwhile_counts_as_old() -> None:
    gc.unfreeze()  # a run of another test may have frozen what was there
    with collector_paused():
        made = [[index] for index in range(10)]
    old = {id(item) for item in gc.get_objects(generation=2)}
    assert {id(item) for item in made} <= old


def test_what_the_program_froze_stays_frozen() -> None:
    frozen = [object()]
    gc.freeze()
    try:
        with collector_paused():
            pass
        assert not any(item is frozen for item in gc.get_objects()), "the collector sees all but what is frozen"
    finally:
        gc.unfreeze()
