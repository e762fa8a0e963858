"""The zoo finds what is wrong with a model, survives what a case does, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from gapfx.verify import SEED
from tools import zoo
from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.checks import check
from tools.zoo_cases.isolation import run_isolated
from tools.zoo_cases.running import Outcome, compare


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Escapes(Net):
    """Reads a weight past its attribute, so that no mask is seen, but not while masks are verified."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight if torch.initial_seed() == SEED else dict(self.named_parameters())["first.weight"]
        return x @ weight.T


class Grows(Net):
    """No two builds are the same."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.last.weight.fill_(time.perf_counter())


class Dies(Net):
    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


class Hangs(Net):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(60)
        return x


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")


def case(kind: Callable[[], nn.Module]) -> Case:
    return Case("made", "net", kind.__name__, kind, lambda size: Inputs((torch.randn(size, 6),)))


def test_a_model_that_runs_passes_every_check_to_the_bit() -> None:
    result = check(case(Net))
    assert (result.status, result.failures) == ("passed", {})
    assert {name: fact for name, fact in result.facts.items() if name.endswith("_bits")} == dict.fromkeys(
        ("outline_bits", "outline eval_bits", "train_bits", "eval_bits", "batch_bits"), True
    )
    assert result.facts["weights"] == 2


def test_a_mask_that_is_not_seen_is_a_failure() -> None:
    result = check(case(Escapes))
    assert result.status == "failed"
    assert "grad.first.weight" in result.failures["train"]


def test_a_model_that_does_not_run_by_itself_is_no_failure() -> None:
    result = check(case(Broken))
    assert result.status == "not runnable"
    assert result.failures == {"eager": "RuntimeError: shapes do not fit"}


def test_builds_that_differ_are_told() -> None:
    assert "two builds under one seed differ in last.weight" in check(case(Grows)).failures["train"]


@pytest.mark.parametrize(
    ("kind", "cause"), [(Dies, "killed by signal 9"), (Hangs, "stopped after 1.5 seconds")], ids=["dies", "hangs"]
)
def test_a_process_that_ends_early_is_a_failed_case(kind: Callable[[], nn.Module], cause: str) -> None:
    made = Case("made", "net", "ends", kind, lambda size: Inputs((torch.randn(size, 6),)))
    found = run_isolated(made, 1.5)
    assert (found["status"], found["failures"]) == ("failed", {"process": cause})


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "zoo.jsonl"
    monkeypatch.setattr(zoo, "load_cases", lambda _: [case(Net), case(Escapes)])

    def sweep(*flags: str) -> list[str]:
        before = len(results.read_text().splitlines()) if results.exists() else 0
        answer = CliRunner().invoke(zoo.app, ["sweep", "made", "--results", str(results), *flags])
        assert answer.exit_code == 0, answer.output
        return [json.loads(line)["key"] for line in results.read_text().splitlines()[before:]]

    assert sweep("--only", "*/Net") == ["made/Net"]
    assert sweep() == ["made/Escapes"]
    assert sweep() == []
    assert sweep("--redo", "failed") == ["made/Escapes"]


def test_the_table_names_every_case_and_cause(tmp_path: Path) -> None:
    results, out = tmp_path / "zoo.jsonl", tmp_path / "COVERAGE.md"
    rows = [run_isolated(case(kind), 60) for kind in (Net, Escapes, Broken)]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    CliRunner().invoke(zoo.app, ["table", str(results), "--out", str(out)], catch_exceptions=False)
    text = out.read_text()
    assert "| made | 2 | 1 | 1 | 1 |" in text
    assert "- `made/Escapes`: train: differs by" in text
    assert "- `made/Broken`: eager: RuntimeError: shapes do not fit" in text
    assert [f"| {name} | net | {mark} |" in text for name, mark in (("Net", ""), ("Escapes", "fails"))] == [True, True]
    assert "| Broken | net | not runnable |" in text


def test_the_committed_page_is_what_the_committed_results_say(tmp_path: Path) -> None:
    out = tmp_path / "COVERAGE.md"
    CliRunner().invoke(zoo.app, ["table", "--out", str(out)], catch_exceptions=False)
    assert out.read_text() == zoo.COVERAGE.read_text(), "run `python tools/zoo.py table`"


@pytest.mark.parametrize(
    ("ours", "theirs", "is_equal"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), False),
        (torch.tensor([1000.0]), torch.tensor([1000.005]), True),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), False),
        (torch.tensor([float("inf")]), torch.tensor([1.0]), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
    ],
)
def test_numbers_are_equal_within_the_tolerance(ours: Tensor, theirs: Tensor, is_equal: bool) -> None:
    assert compare(Outcome({"x": ours}), Outcome({"x": theirs})).is_equal() is is_equal


def test_a_value_that_only_one_side_has_is_a_difference() -> None:
    found = compare(Outcome({"x": torch.ones(1)}), Outcome({"y": torch.ones(1)}))
    assert not found.is_equal()
    assert found.where == "only one side has x, y"
