"""What a budget leaves to the method: the turnover of phases, and the prunes in which a group lands."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapfx.errors import UserError
from gapfx.schedule import Budget, with_schedule
from tests.made_up_plans import plan_of


@pytest.mark.parametrize(
    ("method", "state", "lr"),
    [
        ("gap", "carry", "continue"),
        ("rgap", "carry", "continue"),
        ("pgap", "carry", "continue"),
        ("oneshot", "reset", "restart"),
        ("acdc", "reset", "continue"),
    ],
)
def test_each_method_has_the_turnover_that_it_does_best_with(method: str, state: str, lr: str) -> None:
    growing = [phase for phase in with_schedule(plan_of(3), method, Budget(2, 5, 3)).phases[1:] if phase.grow]
    last = with_schedule(plan_of(3), method, Budget(2, 5, 3)).phases[-1]
    assert {(phase.state, phase.lr) for phase in growing} <= {(state, lr)}
    assert (last.state, last.lr) == (("carry", "continue") if method == "acdc" else (state, lr))


@pytest.mark.parametrize("method", ["gap", "rgap", "pgap"])
def test_the_restarts_of_the_paper_are_there_for_the_asking(method: str) -> None:
    phases = with_schedule(plan_of(3), method, Budget(2, 5, 3, state="reset", lr="restart")).phases
    assert {(phase.state, phase.lr) for phase in phases} == {("reset", "restart")}


@given(st.integers(1, 4), st.integers(1, 50), st.integers(1, 6), st.integers(1, 6))
def test_a_landing_prunes_a_group_further_and_further_within_its_turn(
    rounds: int, phase_steps: int, num_groups: int, landing: int
) -> None:
    budget = Budget(rounds, phase_steps, 3, landing=landing)
    plan = with_schedule(plan_of(num_groups), "gap", budget)
    plan.validate()
    num_parts = min(landing, budget.phase_steps)
    pruning = [phase for phase in plan.phases if phase.prune]
    assert [phase.prune for phase in pruning] == [
        (group,) for _ in range(budget.rounds) for group in range(num_groups) for _ in range(num_parts)
    ]
    for first in range(0, len(pruning), num_parts):
        parts = pruning[first : first + num_parts]
        assert [bool(phase.grow) for phase in parts] == [True] + [False] * (num_parts - 1)
        assert [phase.depth for phase in parts] == pytest.approx(
            [1 - (1 - k / num_parts) ** 3 for k in range(1, num_parts + 1)]
        )
        assert parts[-1].stop - parts[0].start == budget.phase_steps


def test_a_landing_needs_one_learning_rate() -> None:
    with pytest.raises(UserError, match="needs one learning rate and one optimizer state"):
        with_schedule(plan_of(3), "gap", Budget(2, 5, 3, lr="restart", landing=2))


EXCHANGED = Budget(2, 10, 45, exchange=0.3)


def test_sparse_groups_exchange_where_another_one_grows_and_on_into_the_fine_tune() -> None:
    phases = with_schedule(plan_of(3), "gap", EXCHANGED).phases
    assert [(phase.start, phase.stop) for phase in phases] == [
        *((start, start + 10) for start in range(0, 70, 10)),
        (70, 105),
    ]
    assert [phase.drop > 0 for phase in phases] == [False, *[True] * 5, False, True]
    assert {phase.regrow for phase in phases if phase.drop} == {"random"}
    assert [phase.grow for phase in phases if phase.prune] == [(group,) for group in range(3)] * 2


def test_the_share_that_is_exchanged_falls_to_nothing_at_three_quarters_of_the_run() -> None:
    phases = with_schedule(plan_of(3), "gap", EXCHANGED).phases
    shares = {phase.start: phase.drop for phase in phases if phase.drop}
    assert shares == {step: 0.15 * (1 + math.cos(math.pi * step / 78.75)) for step in (10, 20, 30, 40, 50, 70)}


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 60), st.integers(1, 4), st.floats(0.01, 0.9))
def test_an_exchange_leaves_turns_and_steps_as_they_are(
    rounds: int, phase_steps: int, finetune_steps: int, landing: int, share: float
) -> None:
    budget = Budget(rounds, phase_steps, finetune_steps, landing=landing)
    without = with_schedule(plan_of(3), "gap", budget)
    plan = with_schedule(plan_of(3), "gap", dataclasses.replace(budget, exchange=share))
    plan.validate()
    assert plan.num_steps == without.num_steps
    turns = [dataclasses.replace(phase, drop=0.0) for phase in plan.phases if phase.prune]
    assert turns == [phase for phase in without.phases if phase.prune]


@pytest.mark.parametrize(
    ("method", "budget", "reason"),
    [
        ("gap", Budget(1, 5, 3, exchange=0.3, lr="restart"), "an exchange needs one learning rate"),
        ("rgap", Budget(1, 5, 3, exchange=0.3, state="reset"), "an exchange needs one learning rate"),
        ("pgap", Budget(1, 5, 3, exchange=0.3), "pgap has no exchange"),
        ("gap", Budget(1, 5, 3, exchange=1.0), "an exchange of 1.0"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused(method: str, budget: Budget, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        with_schedule(plan_of(3), method, budget)
