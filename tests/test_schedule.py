"""Phase tables: they tile the steps, and each method grows and prunes what it says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapfx.errors import PlanError, UserError
from gapfx.plan import Phase, Plan
from gapfx.schedule import SCHEDULES, Budget, phase_at, with_schedule
from gapfx.text import format_phases
from tests.made_up_plans import plan_of

BUDGETS = st.builds(
    Budget,
    rounds=st.integers(1, 4),
    phase_steps=st.integers(1, 50),
    finetune_steps=st.integers(1, 60),
    state=st.sampled_from(["reset", "carry"]),
)


@given(BUDGETS, st.integers(1, 6), st.sampled_from(list(SCHEDULES)))
def test_phases_tile_the_steps_for_every_method(budget: Budget, num_groups: int, method: str) -> None:
    plan = with_schedule(plan_of(num_groups), method, budget)
    plan.validate()
    assert plan.method == method
    assert Plan.from_json(plan.to_json()) == plan
    covered = [step for phase in plan.phases for step in range(phase.start, phase.stop)]
    assert covered == list(range(plan.num_steps))
    assert [phase_at(plan, step) for step in covered] == [
        index for index, phase in enumerate(plan.phases) for _ in range(phase.num_steps)
    ]


@given(BUDGETS, st.integers(1, 6))
def test_one_budget_is_the_same_number_of_steps_for_all_methods(budget: Budget, num_groups: int) -> None:
    alone = [method for method in SCHEDULES if method != "pgap"]
    totals = {with_schedule(plan_of(num_groups), method, budget).num_steps for method in alone}
    assert totals == {budget.rounds * num_groups * budget.phase_steps + budget.finetune_steps}


@given(BUDGETS, st.integers(1, 6), st.booleans())
def test_gap_has_one_group_dense_at_a_time_and_each_once_a_round_in_cyclic_order(
    budget: Budget, num_groups: int, has_finetune: bool
) -> None:
    budget = budget if has_finetune else dataclasses.replace(budget, finetune_steps=0)
    phases = with_schedule(plan_of(num_groups), "gap", budget).phases
    growing = [phase for phase in phases if phase.grow]
    assert [phase.grow for phase in growing] == [(group,) for group in range(num_groups)] * budget.rounds
    assert [phase.round for phase in growing] == [turn for turn in range(budget.rounds) for _ in range(num_groups)]
    assert all(phase.prune == phase.grow for phase in growing)
    assert {phase.num_steps for phase in growing} == {budget.phase_steps}
    assert {phase.state for phase in phases} == {budget.state}
    assert [(phase.name, phase.num_steps, phase.prune) for phase in phases if not phase.grow] == (
        [("fine-tune", budget.finetune_steps, ())] if has_finetune else []
    )


def test_oneshot_prunes_trained_weights_before_its_first_step_and_trains_as_long_as_other_methods() -> None:
    budget = Budget(2, 5, 3, is_trained=True)
    (phase,) = with_schedule(plan_of(2), "oneshot", budget).phases
    assert (phase.start, phase.stop, phase.grow, phase.prune) == (0, 23, (), ())
    assert with_schedule(plan_of(2), "gap", budget).num_steps == 23
    assert with_schedule(plan_of(2), "oneshot", dataclasses.replace(budget, finetune_steps=0)).num_steps == 20


@pytest.mark.parametrize(
    ("method", "grown", "pruned"),
    [
        ("gap", [(0,), (1,), ()], [(0,), (1,), ()]),
        ("dense", [(0, 1)], [()]),
        ("static", [()], [()]),
        ("oneshot", [(0, 1), ()], [(0, 1), ()]),
        ("acdc", [(0, 1), (), ()], [(0, 1), (), ()]),
        ("gmp", [(0, 1), (), ()], [(0, 1), (0, 1), ()]),
        ("set", [()], [()]),
        ("rigl", [()], [()]),
        ("imp", [(0, 1), (0, 1), (), ()], [(), (0, 1), (0, 1), ()]),
        ("st3", [(0, 1), (0, 1)], [(), (0, 1)]),
    ],
)
def test_each_method_grows_and_prunes_as_it_says(
    method: str, grown: list[tuple[int, ...]], pruned: list[tuple[int, ...]]
) -> None:
    plan = with_schedule(plan_of(2), method, Budget(1, 5, 3))
    assert plan.start_masks == "random"
    assert [phase.grow for phase in plan.phases] == grown
    assert [phase.prune for phase in plan.phases] == pruned


@given(BUDGETS, st.integers(1, 6))
def test_acdc_is_all_dense_and_all_sparse_in_turn_under_one_learning_rate(budget: Budget, num_groups: int) -> None:
    phases = with_schedule(plan_of(num_groups), "acdc", budget).phases
    everything = tuple(range(num_groups))
    assert [phase.grow for phase in phases] == [everything if i % 2 == 0 else () for i in range(len(phases) - 1)] + [()]
    assert all(phase.prune == phase.grow for phase in phases)
    assert {phase.lr for phase in phases} == {"continue"}
    assert all(phase.state == (budget.state if phase.grow else "carry") for phase in phases)


@given(BUDGETS, st.integers(1, 6))
def test_gmp_prunes_everything_further_and_further_to_the_target(budget: Budget, num_groups: int) -> None:
    phases = with_schedule(plan_of(num_groups), "gmp", budget).phases
    pruning = [phase for phase in phases if phase.prune]
    assert [phase.grow for phase in phases] == [tuple(range(num_groups)), *[()] * (len(phases) - 1)]
    shares = [1 - phase.depth for phase in pruning]
    count = len(pruning)
    assert shares == pytest.approx([((count - k) / count) ** 3 for k in range(1, count + 1)])
    assert pruning[-1].depth == 1
    assert {(phase.lr, phase.state) for phase in phases} == {("continue", "carry")}


def test_acdc_ends_sparse() -> None:
    with pytest.raises(UserError, match="acdc would end with a dense phase"):
        with_schedule(plan_of(3), "acdc", Budget(1, 5, 0))
    last = with_schedule(plan_of(3), "acdc", Budget(2, 5, 0)).phases[-1]
    assert (last.name, last.grow, last.prune) == ("sparse 3", (), ())


@given(BUDGETS, st.integers(2, 6), st.integers(0, 5))
def test_rgap_visits_every_group_once_a_round_in_an_order_drawn_by_the_seed(
    budget: Budget, num_groups: int, seed: int
) -> None:
    budget = dataclasses.replace(budget, seed=seed)
    grown = [phase.grow[0] for phase in with_schedule(plan_of(num_groups), "rgap", budget).phases if phase.grow]
    rounds = [grown[first : first + num_groups] for first in range(0, len(grown), num_groups)]
    assert [sorted(order) for order in rounds] == [list(range(num_groups))] * budget.rounds
    assert all(group != following for group, following in itertools.pairwise(grown))
    assert with_schedule(plan_of(num_groups), "rgap", budget) == with_schedule(plan_of(num_groups), "rgap", budget)


def test_rgap_draws_other_orders_for_other_seeds() -> None:
    orders = {with_schedule(plan_of(5), "rgap", Budget(2, 5, 0, seed=seed)).phases for seed in range(6)}
    assert len(orders) == 6


def test_rigl_drops_along_a_cosine_and_rests_for_the_last_quarter() -> None:
    """Evci et al., 2020, section 3: f(t) = alpha / 2 (1 + cos(t pi / T_end)), every delta T steps while t < T_end."""
    phases = with_schedule(plan_of(2), "rigl", Budget(1, 400, 200, update_steps=50)).phases
    updates = {phase.start: phase.drop for phase in phases if phase.drop}
    assert list(updates) == list(range(50, 750, 50))
    assert updates == pytest.approx({t: 0.15 * (1 + math.cos(math.pi * t / 750)) for t in updates})
    assert {phase.regrow for phase in phases} == {"gradient"}
    assert {(phase.lr, phase.state) for phase in phases} == {("continue", "carry")}
    assert phases[0].drop == 0
    assert (phases[-1].start, phases[-1].stop) == (700, 1000)


@given(BUDGETS, st.integers(1, 6), st.floats(0.5, 0.99))
def test_imp_prunes_the_same_share_of_the_live_weights_each_time_and_rewinds_to_the_early_ones(
    budget: Budget, num_groups: int, sparsity: float
) -> None:
    """Frankle et al., 2020, algorithm 2: train to k, keep W_k; train, prune, go back to W_k, and again."""
    plan = with_schedule(dataclasses.replace(plan_of(num_groups), sparsity=sparsity), "imp", budget)
    everything, count = tuple(range(num_groups)), budget.rounds * num_groups
    assert [phase.keep for phase in plan.phases] == [True] + [False] * (len(plan.phases) - 1)
    assert plan.phases[0].stop == max(1, budget.phase_steps // 10)
    assert [phase.prune for phase in plan.phases if phase.prune] == [everything] * count
    live = [1 - phase.depth * sparsity for phase in plan.phases if phase.prune]
    assert live == pytest.approx([(1 - sparsity) ** (k / count) for k in range(1, count + 1)])
    retrained = [phase for phase in plan.phases if phase.rewind]
    assert [phase.start for phase in retrained] == [k * budget.phase_steps for k in range(1, count + 1)]
    assert {(phase.lr, phase.state, phase.grow) for phase in retrained} == {("restart", "reset", ())}


@given(BUDGETS, st.integers(1, 6))
def test_the_early_weights_of_imp_are_those_of_an_ordinary_training_and_each_other_one_goes_on_from_there(
    budget: Budget, num_groups: int
) -> None:
    plan = with_schedule(plan_of(num_groups), "imp", budget)
    first, early = plan.phases[0], plan.phases[0].stop
    assert (first.lr, first.lr_skip, first.lr_steps) == ("restart", 0, budget.phase_steps)
    assert {phase.lr_skip for phase in plan.phases[1:]} == {early}
    assert all(phase.lr_steps == early + phase.num_steps for phase in plan.phases[1:])
    plan.validate()


@given(BUDGETS, st.integers(1, 6))
def test_st3_softens_everything_all_the_time_and_prunes_at_the_end(budget: Budget, num_groups: int) -> None:
    everything = tuple(range(num_groups))
    ramp, hold = with_schedule(plan_of(num_groups), "st3", budget).phases
    assert (ramp.soften, ramp.grow, ramp.prune) == ("ramp", everything, ())
    assert (hold.soften, hold.grow, hold.prune) == ("hold", everything, everything)
    assert {(phase.lr, phase.state) for phase in (ramp, hold)} == {("continue", "carry")}
    (alone,) = with_schedule(plan_of(num_groups), "st3", dataclasses.replace(budget, finetune_steps=0)).phases
    assert (alone.soften, alone.prune) == ("ramp", everything)


def test_snip_is_static_with_masks_by_the_first_gradient() -> None:
    snip, static = (with_schedule(plan_of(2), method, Budget(1, 5, 3)) for method in ("snip", "static"))
    assert snip.start_masks == "snip"
    assert snip.phases == static.phases


@pytest.mark.parametrize("method", ["gap", "rgap", "acdc"])
def test_growth_from_saved_values_is_in_every_growing_phase(method: str) -> None:
    phases = with_schedule(plan_of(3), method, Budget(2, 5, 3, growth="saved")).phases
    assert {phase.growth for phase in phases if phase.grow} == {"saved"}


def test_replicas_grow_from_zero() -> None:
    with pytest.raises(UserError, match="weights of pgap grow from zero"):
        with_schedule(plan_of(3), "pgap", Budget(2, 5, 3, growth="saved"))


def test_set_drops_the_same_share_at_random_to_the_end() -> None:
    phases = with_schedule(plan_of(2), "set", Budget(1, 400, 200, update_steps=300)).phases
    assert [(phase.start, phase.drop, phase.regrow) for phase in phases] == [
        (0, 0.0, "random"),
        (300, 0.3, "random"),
        (600, 0.3, "random"),
        (900, 0.3, "random"),
    ]


@pytest.mark.parametrize("method", ["gap", "dense", "static", "oneshot", "acdc", "gmp", "set", "rigl", "imp", "st3"])
def test_phase_tables_read_like_the_golden_ones(method: str, golden: Callable[[str, str], None]) -> None:
    plan = dataclasses.replace(plan_of(3), sparsity=0.8)
    plan = with_schedule(plan, method, Budget(rounds=2, phase_steps=500, finetune_steps=1000, update_steps=600))
    golden(f"schedule_{method}", format_phases(plan))


def test_what_the_plan_held_before_stays() -> None:
    plan = dataclasses.replace(plan_of(2), criterion="random", sparsity=0.8, phases=(Phase("old", 0, 7),))
    made = with_schedule(plan, "gap", Budget(1, 5, 3))
    assert dataclasses.replace(made, phases=plan.phases) == plan


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("gap", Budget(0, 1, 1), "no schedule of 0 rounds, 1 steps a phase, 1 steps of fine-tuning"),
        ("gap", Budget(1, 0, 1), "--rounds, --phase-epochs and --update-steps must be positive"),
        ("static", Budget(1, 1, -1), "-1 steps of fine-tuning"),
        ("oneshot", Budget(1, 1, 0), "oneshot needs a fine-tune after its prune"),
        ("imp", Budget(1, 1, 0), "imp needs a training after its last prune"),
        ("gmp", Budget(1, 1, 0), "gmp needs a fine-tune after its last prune"),
        ("rigl", Budget(1, 1, 1, update_steps=0), "--phase-epochs and --update-steps must be positive"),
        ("gapp", Budget(1, 1, 1), "unknown method 'gapp'\n  to do: did you mean 'gap'?"),
    ],
)
def test_a_budget_or_method_that_gives_no_run_is_refused(method: str, budget: Budget, message: str) -> None:
    with pytest.raises(UserError) as caught:
        with_schedule(plan_of(2), method, budget)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase("p", 0, 5, rewind=True), "no weights were kept aside to go back to"),
        (Phase("p", 0, 5, (0, 1), (0, 1), replicas=2, soften="hold"), "replicas cannot keep weights aside"),
        (Phase("p", 0, 5, (0, 1), (0, 1), replicas=2, growth="saved"), "replicas cannot keep weights aside"),
    ],
)
def test_a_table_that_cannot_be_followed_is_refused(phase: Phase, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan_of(3), phases=(phase,)).validate()


@pytest.mark.parametrize("method", list(SCHEDULES))
def test_a_plan_without_groups_has_no_schedule(method: str) -> None:
    with pytest.raises(UserError, match="the plan has no groups"):
        with_schedule(Plan(()), method, Budget(1, 1, 1))


@pytest.mark.parametrize("step", [-1, 13, 1000])
def test_a_step_outside_of_the_run_is_in_no_phase(step: int) -> None:
    plan = with_schedule(plan_of(2), "gap", Budget(1, 5, 3))
    with pytest.raises(IndexError, match=r"in no phase of \[0, 13\)"):
        phase_at(plan, step)


@given(BUDGETS, st.integers(2, 6), st.integers(0, 6))
def test_pgap_grows_every_group_once_a_round_one_in_each_replica(
    budget: Budget, num_groups: int, replicas: int
) -> None:
    budget = dataclasses.replace(budget, replicas=replicas)
    if replicas > num_groups:
        with pytest.raises(UserError, match=f"{replicas} replicas are more than the {num_groups} groups"):
            with_schedule(plan_of(num_groups), "pgap", budget)
        return
    phases = [phase for phase in with_schedule(plan_of(num_groups), "pgap", budget).phases if phase.grow]
    for phase in phases:
        shares = [phase.grown_by(replica) for replica in range(phase.replicas)]
        assert sorted(group for share in shares for group in share) == list(phase.grow)
        assert all(len(share) == 1 for share in shares)
        assert phase.replicas <= (replicas or num_groups)
    in_rounds = [[g for p in phases if p.round == turn for g in p.grow] for turn in range(budget.rounds)]
    assert in_rounds == [list(range(num_groups))] * budget.rounds


@pytest.mark.parametrize(("grow", "prune", "replicas"), [((0, 1), (0,), 2), ((0,), (0,), 2), ((0, 1), (0, 1), 0)])
def test_replicas_without_groups_of_their_own_are_refused(
    grow: tuple[int, ...], prune: tuple[int, ...], replicas: int
) -> None:
    plan = dataclasses.replace(plan_of(3), phases=(Phase("p", 0, 5, grow, prune, replicas=replicas),))
    with pytest.raises(PlanError, match="replicas cannot grow"):
        plan.validate()
