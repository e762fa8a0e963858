"""Extensions of other packages: what the installable one in tests/plugin adds, and what a broken one says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gapfx.plan import Plan
from tests.runs import ROOT, TASK, finish, summary

PLUGIN = ROOT / "tests" / "plugin"
FLAGS = ("--phase-epochs", 0.25, "--finetune-epochs", 0.25)

TOML = """
data = "samples.npz"

[[layers]]
kind = "Linear"
sizes = [8, 64]

[[layers]]
kind = "ReLU"

[[layers]]
kind = "Linear"
sizes = [64, 4]

[defaults]
sparsity = 0.75
groups = 2
batch_size = 32
"""
STUDY = """
task = "{task}"
metric = "accuracy"
methods = ["static"]
sparsities = [0.5]
seeds = [0]
budgets = ["epochs"]
[settings]
phase_epochs = 0.25
finetune_epochs = 0.25
"""
LOADED = """
import gapfx, sys, torch
from safetensors.torch import load_file
run = sys.argv[1]
x, plain = torch.randn(5, 8), torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
plain.load_state_dict(load_file(f"{run}/model.safetensors"))
torch.testing.assert_close(gapfx.load(run)(x), plain(x))
print("equal")
"""


@pytest.fixture
def toml_task(tmp_path: Path) -> Path:
    """A task in the plug-in's format, and its data."""
    rng = np.random.default_rng(0)
    x = {f"{split}_x": rng.standard_normal((256, 8), np.float32) for split in ("train", "val", "test")}
    np.savez(tmp_path / "samples.npz", **x, **{key.replace("_x", "_y"): v[:, :4].argmax(1) for key, v in x.items()})  # pyright: ignore[reportArgumentType]
    path = tmp_path / "task.toml"
    path.write_text(TOML)
    return path


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


@pytest.mark.slow
def test_a_file_in_the_format_of_an_installed_package_is_planned_trained_continued_and_loaded(
    installed: Path, toml_task: Path, tmp_path: Path
) -> None:
    here, run = {"PYTHONPATH": str(installed)}, tmp_path / "run"
    code, out, err = finish("plan", toml_task, "--json", **here)
    assert code == 0, err
    assert [weight.fqn for weight in Plan.from_json(out).weights()] == ["0.weight", "2.weight"]
    code, _, err = finish("sparsify", toml_task, "--out", run, *FLAGS, **here)
    assert code == 0, err
    assert summary(run)["sparsity_actual"] == pytest.approx(0.75)
    assert list(summary(run)["metrics"]["final"]) == ["accuracy"]
    (run / "summary.json").unlink()
    code, _, err = finish("sparsify", toml_task, "--out", run, *FLAGS, "--resume", **here)
    assert code == 0, err
    assert summary(run)["sparsity_actual"] == pytest.approx(0.75)
    command = [sys.executable, "-c", LOADED, str(run)]
    loaded = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, check=False)
    assert loaded.stdout == "equal\n", loaded.stderr


@pytest.mark.slow
def test_a_study_compares_methods_on_a_task_in_the_format_of_an_installed_package(
    installed: Path, toml_task: Path, tmp_path: Path
) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace("{task}", str(toml_task)))
    code, out, err = finish("compare", tmp_path / "study.toml", "--out", tmp_path / "out", PYTHONPATH=str(installed))
    assert code == 0, err
    assert "static" in out


@pytest.mark.distributed
def test_two_ranks_read_a_task_in_the_format_of_an_installed_package(
    installed: Path, toml_task: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _, err = finish("sparsify", toml_task, "--out", run, *FLAGS, "--nproc", 2, PYTHONPATH=str(installed))
    assert code == 0, err
    assert summary(run)["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"Linear"', '"Liner"', "torch.nn has no layer 'Liner'"),
        ("[8, 64]", "[8]", "model() failed: TypeError: "),
        ("sparsity = 0.75", "sparsty = 0.75", "did you mean 'sparsity'?"),
        ("data =", "data", "the task file cannot be read: TOMLDecodeError: "),
        ("samples.npz", "nowhere.npz", "data() failed: FileNotFoundError: "),
    ],
)
def test_mistakes_in_a_file_of_an_installed_format_are_named_like_those_in_a_python_file(
    installed: Path, toml_task: Path, old: str, new: str, problem: str
) -> None:
    toml_task.write_text(TOML.replace(old, new, 1))
    code, _, err = finish("plan", toml_task, PYTHONPATH=str(installed))
    assert code == 2
    assert problem in err
    assert str(toml_task) in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_an_unknown_suffix_lists_the_formats_of_installed_packages(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("model: x\n")
    code, _, err = finish("plan", tmp_path / "task.yaml", PYTHONPATH=str(installed))
    assert code == 2
    assert "task.yaml is no task file: unknown format '.yaml'\n  to do: known formats: .py, .toml" in err


def test_without_the_package_its_format_is_unknown(toml_task: Path) -> None:
    code, _, err = finish("plan", toml_task)
    assert code == 2
    assert "task.toml is no task file: unknown format '.toml'\n  to do: known formats: .py\n" in err


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
            "two method entries are called 'gap': gapfx.schedules.growing.gap and broken_plugin.mine",
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
