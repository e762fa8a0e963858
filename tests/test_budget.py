"""What a budget leaves to the method: the turnover of phases, and the prunes in which a group lands."""

from __future__ import annotations

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
