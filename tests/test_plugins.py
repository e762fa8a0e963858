"""Extensions of other packages: what the installable one in tests/plugin adds, and what a broken one says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gapfx.plan import Plan
from tests.runs import ROOT, TASK, finish, summary

PLUGIN = ROOT / "tests" / "plugin"
FLAGS = ("--phase-epochs", 0.25, "--finetune-epochs", 0.25)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the plug-in."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")  # pip builds beside it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def broken(folder: Path, code: str) -> Path:
    """A package as pip leaves it, whose module is `code`."""
    (folder / "broken_plugin.py").write_text(code)
    facts = folder / "broken_plugin-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[gapfx.plugins]\nbroken = broken_plugin\n")
    return folder


@pytest.mark.slow
def test_a_run_takes_method_criterion_and_pattern_of_an_installed_package(installed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ("--method", "backwards", "--criterion", "relative-magnitude", "--pattern", "outputs", "--sparsity", 0.5)
    code, _, err = finish("sparsify", TASK, "--out", run, *own, *FLAGS, PYTHONPATH=str(installed))
    assert code == 0, err
    plan = Plan.load(run / "plan.json")
    assert [phase.grow for phase in plan.phases] == [(2,), (1,), (0,)] * 2 + [()]
    assert {weight.pattern for weight in plan.weights()} == {"outputs"}
    assert summary(run)["sparsity_actual"] == pytest.approx(0.5)


@pytest.mark.slow
def test_a_pass_of_an_installed_package_joins_the_pipeline(installed: Path) -> None:
    code, out, err = finish("passes", PYTHONPATH=str(installed))
    assert code == 0, err
    assert "count-groups" in out
    pipeline = "partition{groups=2},count-groups{least=3},insert-masks"
    code, _, err = finish("plan", TASK, "--passes", pipeline, PYTHONPATH=str(installed))
    assert code == 2
    assert "2 groups are fewer than 3" in err


def test_without_the_package_its_names_are_unknown() -> None:
    code, _, err = finish("plan", TASK, "--method", "backwards")
    assert code == 2
    assert "unknown method 'backwards'" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (
            "from gapfx.schedule import SCHEDULES\n@SCHEDULES.register('gap')\ndef mine(budget, num_groups): ...",
            "two method entries are called 'gap': gapfx.schedule.gap and broken_plugin.mine",
        ),
    ],
)
def test_a_broken_package_is_named_where_it_is_needed_and_nowhere_else(code: str, problem: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, code)
    status, _, err = finish("plan", TASK, "--method", "backwards", PYTHONPATH=str(folder))
    assert status == 2
    assert problem in err
    assert "Traceback" not in err
    status, _, err = finish("plan", TASK, PYTHONPATH=str(folder))
    assert status == 0, err
