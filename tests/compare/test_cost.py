"""What a run costs whose weights keep what a prune left them."""

from __future__ import annotations

import pytest

from gapfx.compare.cost import is_found_by_run, with_shares
from gapfx.flops import ForwardFlops, training_flops
from gapfx.plan import Group, Plan, Weight
from gapfx.schedule import Budget, with_schedule

WEIGHTS = Weight("a", (10, 10), 0.8), Weight("b", (10, 10), 0.8), Weight("tiled", (10, 10), 0.5, "2:4")
PLAN = with_schedule(Plan((Group("all", WEIGHTS),), sparsity=0.7, allocation="global"), "static", Budget(1, 5, 5))


def test_weights_take_the_shares_of_a_run_and_keep_their_own_without_one() -> None:
    forward = ForwardFlops(1000, {"a": 100, "b": 600, "tiled": 200})
    plan = with_shares(PLAN, {"a": 0.1, "b": 0.3})
    assert training_flops(plan, forward) == pytest.approx(3 * PLAN.num_steps * (100 + 10 + 180 + 100))
    assert with_shares(PLAN, {}) == PLAN


def test_a_plan_knows_its_shares_unless_one_threshold_is_over_many_weights() -> None:
    assert is_found_by_run(PLAN)
    assert not is_found_by_run(with_shares(Plan(PLAN.groups, allocation="erk", sparsity=0.7), {}))
    assert not is_found_by_run(Plan(PLAN.groups, allocation="global", sparsity=0.0))
