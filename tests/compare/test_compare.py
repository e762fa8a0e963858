"""`gapfx compare` on a task that trains in a second: budgets, what is kept, what is refused, and its files."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import TASK, events, gapfx, start

pytestmark = pytest.mark.slow

STUDY = f"""
task = "{TASK}"
metric = "accuracy"
methods = ["dense", "gap"]
sparsities = [0.8]
seeds = [0, 1]

[settings]
rounds = 1
phase_epochs = 0.25
finetune_epochs = 0.25
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "study.toml").write_text(STUDY)
    assert gapfx("compare", folder / "study.toml", "--out", folder / "runs", "--parallel", 2) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((folder / "runs" / "comparison.json").read_text())["rows"]
    return {(row["name"], row["budget"]): row for row in found}


def test_steps_are_equal_in_one_comparison_and_operations_in_the_other(finished: Path) -> None:
    found = rows(finished)
    assert found["gap", "epochs"]["epochs"] == found["dense", "epochs"]["epochs"]
    assert found["gap", "epochs"]["flops"] < 0.7 * found["dense", "epochs"]["flops"]
    assert found["gap", "flops"]["flops"] == pytest.approx(found["dense", "flops"]["flops"], rel=0.1)
    assert found["gap", "flops"]["epochs"] > 1.5 * found["dense", "flops"]["epochs"]


def test_rows_pair_the_seeds_with_the_dense_runs(finished: Path) -> None:
    gap, dense = (rows(finished)[name, "epochs"] for name in ("gap", "dense"))
    ours, theirs = gap["value"]["values"], dense["value"]["values"]
    assert len(ours) == len(theirs) == 2
    assert gap["against"]["mean"] == pytest.approx(sum(ours) / 2 - sum(theirs) / 2)
    assert gap["against"]["p"] >= 0.5
    assert dense["against"] is None


def test_live_bytes_are_those_of_values_and_masks(finished: Path) -> None:
    found = rows(finished)
    summary = json.loads((finished / "runs" / "gap-0.8-0-epochs" / "summary.json").read_text())
    planned = summary["per_weight"].values()
    numel, kept = (sum(weight[key] for weight in planned) for key in ("numel", "kept"))
    total = found["dense", "epochs"]["live_bytes"] / 4
    assert found["gap", "epochs"]["live_bytes"] == 4 * (total - numel + kept) + numel / 8


def test_the_page_and_the_table_name_every_row(finished: Path) -> None:
    page, table = ((finished / "runs" / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    assert page.count('role="img"') == 6
    assert all(unit in page for unit in ("% of planned weights", " operations", "bytes of fp32 values"))
    assert "http" not in page
    assert table.count("| gap | 0.8 |") == table.count("| dense | 0 |") == 2


def test_finished_runs_are_taken_as_they_are(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in (copied / "runs").rglob("summary.json")}
    records = copied / "runs" / "runs.jsonl"
    kept = [line for line in records.read_text().splitlines() if "gap-0.8-1-flops" not in line]
    records.write_text("".join(f"{line}\n" for line in kept))
    assert gapfx("compare", copied / "study.toml", "--out", copied / "runs") == 0
    assert {path: path.stat().st_mtime_ns for path in (copied / "runs").rglob("summary.json")} == times
    assert "gap-0.8-0-epochs" not in capsys.readouterr().err
    assert len(rows(copied)["gap", "flops"]["value"]["values"]) == 2


def test_the_records_are_enough_for_the_tables(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("study.toml", "runs/runs.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "runs") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        *("comparison.html", "comparison.json", "comparison.md", "runs.jsonl")
    ]
    assert rows(tmp_path) == rows(finished)


def test_learning_rates_are_tuned_on_the_validation_data_and_runs_judged_on_the_test_data(tmp_path: Path) -> None:
    tuned = STUDY.replace("seeds = [0, 1]", 'seeds = [0]\nbudgets = ["epochs"]\ntest = true')
    (tmp_path / "study.toml").write_text(f"{tuned}\n[tune]\nlr_scale = [0.001, 1]\nsparsity = 0.8\nseed = 9\n")
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "runs", "--parallel", 2) == 0
    records = {r["name"]: r for r in map(json.loads, (tmp_path / "runs" / "runs.jsonl").read_text().splitlines())}
    assert {name for name, record in records.items() if record["test"]} == {"dense-0-0-epochs", "gap-0.8-0-epochs"}
    assert {name: r["settings"]["lr_scale"] for name, r in records.items()} == {
        "dense-0-9-lr0.001": 0.001,
        "dense-0-9-lr1": 1.0,
        "gap-0.8-9-lr0.001": 0.001,
        "gap-0.8-9-lr1": 1.0,
        "dense-0-0-epochs": 1.0,
        "gap-0.8-0-epochs": 1.0,
    }
    assert rows(tmp_path)["gap", "epochs"]["value"]["values"] == [records["gap-0.8-0-epochs"]["test"]["accuracy"]]


SNIP = STUDY.replace('"gap"', '"snip"').replace("[0, 1]", "[0]") + 'groups = 1\nallocation = "global"\n'


def test_where_a_threshold_shares_out_the_zeros_operations_go_by_what_each_weight_has_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(SNIP)
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "runs", "--parallel", 2) == 0
    found = rows(tmp_path)
    assert found["snip", "flops"]["flops"] == pytest.approx(found["dense", "flops"]["flops"], rel=0.05)
    records = {r["name"]: r for r in map(json.loads, (tmp_path / "runs" / "runs.jsonl").read_text().splitlines())}
    summary = json.loads((tmp_path / "runs" / "snip-0.8-0-epochs" / "summary.json").read_text())
    shares = records["snip-0.8-0-epochs"]["shares"]
    assert shares == {fqn: weight["kept"] / weight["numel"] for fqn, weight in summary["per_weight"].items()}
    assert max(shares.values()) > 1.3 * min(shares.values())
    assert records["dense-0-0-epochs"]["shares"] == {}
    (tmp_path / "study.toml").write_text(SNIP.replace("seeds", 'budgets = ["flops"]\nseeds'))
    capsys.readouterr()
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "other") == 2
    assert "what snip-0.8-0-flops costs is told by snip-0.8-0-epochs, which is not there" in capsys.readouterr().err


def test_runs_of_other_settings_are_not_mixed_in(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "study.toml").write_text(STUDY.replace("rounds = 1", "rounds = 2"))
    assert gapfx("compare", copied / "study.toml", "--out", copied / "runs") == 2
    assert "was made with other settings than the study has now" in capsys.readouterr().err


def test_collecting_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "runs", "--collect") == 2
    assert "no run of the study is finished" in capsys.readouterr().err


def test_a_run_that_fails_is_told_with_its_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace("rounds = 1", "rounds = 1\nbatch_size = 32\nmicro_batch = 5"))
    assert gapfx("compare", tmp_path / "study.toml", "--out", tmp_path / "runs") == 2
    assert "a batch of 32 is no multiple of micro-batches of 5" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_runs_too_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    long = STUDY.replace("rounds = 1", "rounds = 10").replace("seeds", 'budgets = ["epochs"]\nseeds')
    (tmp_path / "study.toml").write_text(long)
    flags = ("compare", tmp_path / "study.toml", "--out", tmp_path / "runs", "--parallel", 2)
    process = start(*flags)
    metrics, deadline = tmp_path / "runs" / "gap-0.8-0-epochs" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"step"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert children
    assert not any(child.is_running() for child in children)
    (tmp_path / "study.toml").write_text(long.replace("[0, 1]", "[0]"))
    assert gapfx(*flags) == 0
    assert len(events(tmp_path / "runs" / "gap-0.8-0-epochs", "resume")) == 1


def test_a_metric_that_the_task_has_not_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "study.toml").write_text(STUDY.replace('"accuracy"', '"bleu"'))
    assert gapfx("compare", copied / "study.toml", "--out", copied / "runs") == 2
    assert "the task gives no metric 'bleu'" in capsys.readouterr().err
