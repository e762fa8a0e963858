"""The command line: its surface, and the commands that do not train."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from gapfx.cli import app
from gapfx.plan import Phase, Plan
from gapfx.settings import Settings
from tests.runs import TASK, events, gapfx, summary, weights

COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
TINY = ("--rounds", 1, "--phase-epochs", 0.2, "--finetune-epochs", 0.2)


def test_the_surface_changes_only_on_purpose(golden: Callable[[str, str], None]) -> None:
    lines = [
        f"{name} {' '.join(sorted('/'.join(option.opts) for option in command.params))}"
        for name, command in COMMANDS.items()
    ]
    golden("cli_surface", "\n".join(lines))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_of_flags_that_it_has(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx(command, "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: gapfx" in out
    epilog = COMMANDS[command].epilog
    assert epilog in out
    prefix, _, example = epilog.partition(f"gapfx {command}")
    assert prefix == "For example: "
    known = {name for option in COMMANDS[command].params for name in option.opts}
    assert {word for word in example.split() if word.startswith("--")} <= known


def test_the_help_tells_the_defaults_of_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert gapfx("sparsify", "--help") == 0
    out = capsys.readouterr().out
    assert "Share of zeros in each planned weight. (default 0.9)" in out
    assert "Checkpoints that are kept. (default 3)" in out


@pytest.mark.parametrize("command", ["sparsify", "plan", "bench"])
def test_every_flag_of_a_setting_is_a_setting_of_the_same_name(command: str) -> None:
    told = {o.name: o.help for o in COMMANDS[command].params if o.name in vars(Settings())}
    assert len(told) > 5
    for name, words in told.items():
        value = getattr(Settings(), name)
        is_told = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
        assert words.endswith(f"(default {value})") == is_told, name


def test_plan_shows_groups_and_phases(golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("plan", TASK) == 0
    golden("cli_plan", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "phase"),
    [
        (("--landing", 2), {"depth": 0.875, "state": "carry", "lr": "continue"}),
        (("--state", "reset", "--phase-lr", "restart"), {"depth": 1.0, "state": "reset", "lr": "restart"}),
        (("--exchange", 0.3), {"depth": 1.0, "drop": 0.0, "state": "carry"}),
        (("--growth", "saved"), {"depth": 1.0, "growth": "saved"}),
    ],
)
def test_plan_shows_the_phases_that_a_run_with_the_same_flags_has(
    flags: tuple[str | int, ...], phase: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx("plan", TASK, "--json", *flags) == 0
    first = json.loads(capsys.readouterr().out)["phases"][0]
    assert {name: first.get(name, getattr(Phase, name)) for name in phase} == phase


def test_plan_refuses_prunes_that_a_run_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("plan", TASK, "--pattern", "2:4", "--sparsity", 0.5, "--landing", 2) == 2
    assert "which cannot be reached step by step" in capsys.readouterr().err


def test_show_passes_prints_what_each_pass_changed(
    golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx("plan", TASK, "--show-passes", "--dense", "blocks.1", "--dense", "blocks.2") == 0
    golden("cli_show_passes", capsys.readouterr().out)


def test_a_pipeline_can_be_given_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = "partition{groups=2},allocate-sparsity{sparsity=0.5,allocation=erk},insert-masks"
    assert gapfx("plan", TASK, "--json", "--passes", text) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert (len(plan.groups), plan.allocation, plan.sparsity) == (2, "erk", 0.5)


def test_a_run_is_continued_only_with_the_pipeline_that_it_was_started_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("sparsify", TASK, "--out", tmp_path / "run", *TINY)
    text = "partition{groups=2},allocate-sparsity{sparsity=0.5},insert-masks"
    assert gapfx(*run, "--passes", text) == 0
    assert gapfx(*run, "--resume", "--passes", text.replace("2", "3")) == 2
    assert f"the run was started with passes '{text}', not 'partition{{groups=3}}" in capsys.readouterr().err
    assert gapfx(*run, "--resume", "--passes", text) == 0


def test_an_edited_plan_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("plan", TASK, "--json", *TINY) == 0
    plan = json.loads(capsys.readouterr().out)
    plan["groups"][0]["weights"][0]["sparsity"] = 0.25
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--plan", tmp_path / "plan.json") == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan
    fqn = plan["groups"][0]["weights"][0]["fqn"]
    facts = summary(tmp_path / "run")["per_weight"][fqn]
    assert facts["kept"] == facts["numel"] - round(facts["numel"] * 0.25)


def test_a_model_alone_is_enough_for_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "only.py"
    task.write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))\n")
    assert gapfx("plan", f"{task}:net", "--input", "4x8", "--groups", 2) == 0
    assert "0.weight" not in capsys.readouterr().err
    assert gapfx("plan", f"{task}:net") == 2
    assert "give --input 2x3x224x224" in capsys.readouterr().err


def test_passes_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("passes") == 0
    out = capsys.readouterr().out
    for name in ("find-weights", "tie-weights", "find-blocks", "partition", "allocate-sparsity", "insert-masks"):
        assert f"\n{name} (" in out


def test_doctor_reports_versions_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["torch"]
    assert findings["memory_bytes"] > 0


def test_report_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert gapfx("sparsify", TASK, "--out", run, *TINY) == 0
    (run / "report.html").unlink()
    assert gapfx("report", run) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert gapfx("report", tmp_path) == 2


def test_a_run_leaves_every_file_and_counts_exactly(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gapfx("sparsify", TASK, "--out", run, *TINY) == 0
    names = {path.name for path in run.iterdir()}
    files = {"config.json", "plan.json", "metrics.jsonl", "checkpoints", "model.safetensors", "summary.json"}
    assert names == files | {"report.html", "task.json", "model.gapfx"}
    assert [event["event"] for event in events(run, "start") + events(run, "end")] == ["start", "end"]
    facts = summary(run)
    keys = "method sparsity_target sparsity_actual sparsity_model num_parameters per_weight groups phases metrics"
    keys += " seconds peak_rss_bytes peak_rss_bytes_by_rank world_size zero_stage form seed versions"
    assert set(facts) == set(keys.split())
    kept = sum(weight["kept"] for weight in facts["per_weight"].values())
    numel = sum(weight["numel"] for weight in facts["per_weight"].values())
    assert facts["sparsity_actual"] == 1 - kept / numel
    assert facts["sparsity_model"] == (numel - kept) / sum(tensor.numel() for tensor in weights(run).values())


@pytest.mark.parametrize(("given", "waiting"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_how(
    given: dict[str, str], waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert gapfx("passes") == 0
    assert os.environ["OMP_WAIT_POLICY"] == waiting


def test_a_wrong_word_for_the_kernels_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GAPFX_NATIVE", "avx")
    assert gapfx("passes") == 2
    told = capsys.readouterr().err
    assert "GAPFX_NATIVE is 'avx'" in told
    assert "portable, avx2 or avx512" in told
