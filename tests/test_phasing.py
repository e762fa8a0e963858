"""Phases by settings, and flags beside a plan that decides what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapfx.errors import UserError
from gapfx.phasing import check_flags, with_phases
from gapfx.plan import Plan
from gapfx.settings import Settings, merge
from tests.made_up_plans import plan_of
from tests.runs import TASK, gapfx

GAP = Settings(method="gap", sparsity=0.8, rounds=2)
PLAN = with_phases(plan_of(3), GAP, 10)
Capsys = pytest.CaptureFixture[str]


def check(plan: Plan, **flags: Any) -> None:
    check_flags(plan, merge(("", {**vars(GAP), "partition": "blocks"}), ("flags", flags)), 10, flags, "plan.json")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"method": None, "dense": None, "group": None},
        {"method": "gap", "rounds": 2, "phase_epochs": 1.0, "landing": 1, "state": "auto"},
        {"groups": 3, "sparsity": 0.8, "pattern": "unstructured", "criterion": "magnitude", "allocation": "uniform"},
        {"groups": "auto", "pattern": "auto", "dense": ["head*", "last"]},
        {"batch_size": 64, "seed": 3, "lr_scale": 2.0, "regrow_warmup": 5},
    ],
)
def test_flags_that_say_what_the_plan_says_or_what_it_does_not_decide_are_fine(flags: dict[str, Any]) -> None:
    check(PLAN, **flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"method": "rigl", "sparsity": 0.99}, "--sparsity (0.99), --method ('rigl')"),
        ({"groups": 2, "pattern": "2:4"}, "--groups (2), --pattern ('2:4')"),
        ({"criterion": "random", "allocation": "erk"}, "--allocation ('erk'), --criterion ('random')"),
        ({"rounds": 1}, "--rounds (1)"),
        ({"exchange": 0.3}, "--exchange (0.3)"),
        ({"landing": 4, "growth": "saved"}, "--growth ('saved'), --landing (4)"),
        ({"update_steps": 5}, "--update-steps (5)"),
        ({"dense": ["layer1"]}, "--dense (('layer1',))"),
        ({"passes": "insert-masks"}, "--passes ('insert-masks')"),
        ({"group": ["layer0", "layer1", "layer0"], "partition": "by-hand"}, "--group (('layer0', 'layer1', 'layer0'))"),
    ],
)
def test_flags_that_say_otherwise_than_the_plan_are_named_in_one_message(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        check(PLAN, **flags)
    assert f"the plan decides this, and says otherwise: {named}\n" in str(caught.value)
    assert "leave these flags out, or make the plan anew with them by `gapfx plan --json`" in str(caught.value)


def test_the_phases_of_a_plan_without_any_are_those_of_the_flags() -> None:
    check(plan_of(3), method="rigl", rounds=5, update_steps=7)
    with pytest.raises(UserError, match="the method gmp does not read --landing"):
        check(plan_of(3), method="gmp", landing=4)


def test_defaults_of_a_task_are_no_flags(tmp_path: Path, capsys: Capsys) -> None:
    task = tmp_path / "task.py"
    task.write_text(TASK.read_text().replace('"sparsity": 0.8', '"landing": 4, "update_steps": 5, "sparsity": 0.8'))
    assert gapfx("plan", task, "--json") == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    assert gapfx("plan", task, "--method", "gmp") == 0
    task.write_text(TASK.read_text().replace('"sparsity": 0.8', '"method": "rigl", "sparsity": 0.6'))
    assert gapfx("plan", task, "--plan", tmp_path / "plan.json") == 0
    assert "method gap, sparsity 80.0%" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "sparsify"])
def test_both_commands_refuse_flags_against_the_plan(command: str, tmp_path: Path, capsys: Capsys) -> None:
    assert gapfx("plan", TASK, "--json") == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    out = ("--out", tmp_path / "run") if command == "sparsify" else ()
    assert gapfx(command, TASK, *out, "--plan", tmp_path / "plan.json", "--method", "rigl", "--rounds", 2) == 2
    err = capsys.readouterr().err
    assert "the plan decides this, and says otherwise: --method ('rigl')\n  where: " in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--zero", 3), "a soft threshold takes whole weights, which no rank has at ZeRO stage 3"),
        (("--pattern", "2:4", "--sparsity", 0.5), "which a soft threshold does not keep"),
    ],
)
def test_plan_refuses_soft_thresholds_that_a_run_would_refuse(
    flags: tuple[object, ...], reason: str, tmp_path: Path, capsys: Capsys
) -> None:
    for command in (("plan", TASK), ("sparsify", TASK, "--out", tmp_path / "run")):
        assert gapfx(*command, "--method", "st3", *flags) == 2
        assert reason in capsys.readouterr().err


def test_trained_weights_are_masked_by_the_criterion_under_a_plan_too() -> None:
    assert PLAN.start_masks == "random"
    settings = Settings(method="gap", init="run", criterion="magnitude")
    assert with_phases(PLAN, settings, 10).start_masks == "magnitude"
    assert with_phases(plan_of(3), settings, 10).start_masks == "magnitude"
    snip = with_phases(plan_of(3), Settings(method="snip"), 10)
    assert with_phases(snip, settings, 10).start_masks == "snip"
