"""Factors of the learning rate over a phase and over a run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapfx.errors import TaskError
from gapfx.plan import Phase
from gapfx.runtime.learning_rate import factor_at, scaled, warmup_cosine
from tests.runs import TASK, gapfx


@given(st.integers(1, 5000))
def test_the_factor_rises_to_one_and_falls_towards_zero(num_steps: int) -> None:
    factors = [warmup_cosine(step, num_steps) for step in range(num_steps)]
    top = max(1, round(num_steps * 0.1))
    assert max(factors) == 1
    assert factors[top - 1] == 1
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert min(factors) > 0


def test_the_values_of_a_hundred_steps() -> None:
    assert [warmup_cosine(step, 100) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(warmup_cosine(55, 100), 0.5)
    assert math.isclose(warmup_cosine(100, 100), 0, abs_tol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_phase_of_few_steps_trains(num_steps: int) -> None:
    assert all(warmup_cosine(step, num_steps) > 0.4 for step in range(min(2, num_steps)))


@pytest.mark.parametrize(("lr", "seen"), [("restart", (3, 10)), ("continue", (23, 50))])
def test_a_phase_restarts_the_factor_or_goes_on(lr: str, seen: tuple[int, int]) -> None:
    calls: list[tuple[int, int]] = []
    phase = Phase("p", 20, 30, lr="restart" if lr == "restart" else "continue")
    assert factor_at(23, phase, 50, lambda step, num_steps: calls.append((step, num_steps)) or 0.25) == 0.25
    assert calls == [seen]


def test_a_part_of_a_schedule_goes_on_where_the_other_part_ended() -> None:
    early, rest = Phase("early", 0, 4, lr_steps=40), Phase("rest", 4, 40, lr_skip=4, lr_steps=40)
    again = Phase("again", 40, 76, lr_skip=4, lr_steps=40)
    whole = [warmup_cosine(step, 40) for step in range(40)]
    assert [factor_at(step, early if step < 4 else rest, 90, warmup_cosine) for step in range(40)] == whole
    assert [factor_at(step, again, 90, warmup_cosine) for step in range(40, 76)] == whole[4:]


@pytest.mark.parametrize("value", [None, "0.1", math.nan, math.inf, -1.0, True])
def test_a_factor_that_is_no_number_from_zero_up_is_named(value: Any) -> None:
    with pytest.raises(TaskError, match=re.escape(f"lr(3, 10) returned {value!r}")):
        scaled(lambda step, num_steps: value, 2.0)(3, 10)
    assert scaled(lambda step, num_steps: 0, 2.0)(3, 10) == 0


def test_a_wrong_factor_is_told_before_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "task.py"
    task.write_text(TASK.read_text() + "\n\ndef lr(step, num_steps):\n    return None\n")
    assert gapfx("sparsify", task, "--out", tmp_path / "run") == 2
    assert "lr(0, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
