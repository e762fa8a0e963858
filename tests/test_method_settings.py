"""What a method does not read is refused where it is meant for it, and plays no part where it is not."""

from __future__ import annotations

import dataclasses

import pytest

from gapfx.budget import READS, Schedule
from gapfx.errors import UserError
from gapfx.method_settings import SOME, as_read, check_read, read_by, unread
from gapfx.plan import Plan
from gapfx.schedule import SCHEDULES, Budget, with_schedule
from gapfx.settings import Settings
from tests.made_up_plans import plan_of

BUDGET = Budget(rounds=2, phase_steps=20, finetune_steps=60)
METHODS = [name for name in SCHEDULES if SCHEDULES[name].__module__.startswith("gapfx.")]
# Of each setting, changes of a budget of which at least one shows where it is read.
CHANGES: dict[str, tuple[dict[str, object], ...]] = {
    "state": ({"state": "reset"}, {"state": "carry"}),
    "phase_lr": ({"lr": "restart"}, {"lr": "continue"}),
    "growth": ({"growth": "saved", "replicas": 1},),
    "landing": ({"landing": 2},),
    "exchange": ({"exchange": 0.3},),
    "update_steps": ({"update_steps": 30},),
    "replicas": ({"replicas": 3},),
}


def changed(method: str, change: dict[str, object]) -> bool:
    base = dataclasses.replace(BUDGET, replicas=1)
    try:
        other = with_schedule(plan_of(3), method, dataclasses.replace(base, **change))  # pyright: ignore
    except UserError:
        return False
    return other != with_schedule(plan_of(3), method, base)


def regrows(plan: Plan) -> bool:
    """Whether a group becomes dense that was not."""
    dense = set(plan.phases[0].grow if plan.phases[0].replicas == 1 else ())
    for phase in plan.phases:
        if set(phase.grow) - dense:
            return True
        dense = (dense | set(phase.grow)) - set(phase.prune)
    return False


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_what_it_says(method: str) -> None:
    found = {name for name, changes in CHANGES.items() if any(changed(method, change) for change in changes)}
    assert READS[SCHEDULES[method]] - {"regrow_warmup"} == found


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_warm_up_where_a_sparse_group_grows(method: str) -> None:
    assert ("regrow_warmup" in READS[SCHEDULES[method]]) is regrows(with_schedule(plan_of(3), method, BUDGET))


@pytest.mark.parametrize(
    ("method", "given", "reason"),
    [
        ("pgap", {"landing": 4}, "the method pgap does not read --landing\n  to do: leave it out, or take another"),
        ("gmp", {"exchange": 0.3}, "take another method: --exchange is for gap, rgap"),
        ("static", {"growth": "saved"}, "--growth is for gap, rgap, pgap, acdc"),
        ("rigl", {"regrow_warmup": 50}, "the method rigl does not read --regrow-warmup"),
        ("gap", {"update_steps": 5, "replicas": 2}, "--update-steps is for set, rigl; --replicas is for pgap"),
        ("acdc", {"phase_lr": "restart"}, "--phase-lr is for gap, rgap, pgap, oneshot"),
    ],
)
def test_what_a_method_does_not_read_is_refused_with_those_that_do(
    method: str, given: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_read(method, given)
    assert reason in str(caught.value)


def test_defaults_and_what_is_not_given_are_no_mistake() -> None:
    for method in METHODS:
        check_read(method, {name: getattr(Settings, name) for name in SOME})
        check_read(method, dict.fromkeys(SOME))
        check_read(method, {"rounds": 9, "sparsity": 0.5})


def test_a_method_that_does_not_say_may_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(SCHEDULES)["_entries"], "mine", lambda budget, num_groups: Schedule(()))
    check_read("mine", {"landing": 4, "exchange": 0.3, "update_steps": 5})


def test_settings_that_are_shared_play_no_part_for_methods_that_do_not_read_them() -> None:
    shared = {"update_steps": 50, "rounds": 2}
    assert read_by("rigl", shared) == shared
    assert read_by("gmp", shared) == {"rounds": 2}
    settings = Settings(method="gmp", update_steps=50, rounds=2)
    assert unread("gmp", vars(settings)) == ("update_steps",)
    assert as_read(settings) == Settings(method="gmp", rounds=2)
