"""What a study file says, and what is wrong with one that says it badly."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapfx.compare.study import Study, read_study
from gapfx.errors import UserError

GOOD = """
task = "task.py"
metric = "accuracy"
methods = ["dense", "gap", "kept"]
sparsities = [0.8, 0.9]
seeds = [0, 1]

[settings]
rounds = 2

[method.kept]
method = "gap"
state = "carry"
"""


def read(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


@pytest.mark.parametrize(
    ("metric", "line", "is_lower"),
    [
        ("accuracy", "", False),
        ("ppl", "", True),
        ("score", "lower_is_better = true", True),
        ("mae", "lower_is_better = false", False),
    ],
)
def test_a_metric_falls_or_rises_by_its_name_unless_the_file_says(
    metric: str, line: str, is_lower: bool, tmp_path: Path
) -> None:
    study = read(tmp_path, GOOD.replace('"accuracy"', f'"{metric}"\n{line}'))
    assert study.is_lower_better is is_lower


def test_the_control_is_trained_once_a_seed_and_all_else_once_a_budget(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD)
    names = [trial.name for trial in study.trials()]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 2 * 2)
    assert names[:3] == ["dense-0-0-epochs", "gap-0.8-0-epochs", "gap-0.9-0-epochs"]
    assert "dense-0-0-flops" not in names
    assert [name for name in names if name.startswith("kept")][:2] == ["kept-0.8-0-epochs", "kept-0.9-0-epochs"]


def test_operations_below_those_of_the_control_give_it_a_run_of_its_own(tmp_path: Path) -> None:
    study = read(tmp_path, f"flops = 0.5\n{GOOD}")
    names = [trial.name for trial in study.trials()]
    assert len(names) == 2 * (1 + 2 * 2) * 2
    assert {"dense-0-0-epochs", "dense-0-0-flops"} < set(names)


TUNED = f"""{GOOD}
[tune]
lr_scale = [0.5, 1, 2]
sparsity = 0.95
seed = 100
"""


def test_every_contender_tries_the_same_learning_rates_with_a_seed_of_their_own(tmp_path: Path) -> None:
    study = read(tmp_path, TUNED)
    trials = list(study.tuning_trials())
    assert {trial.contender.name for trial in trials} == {"dense", "gap", "kept"}
    for name, sparsity in (("dense", 0.0), ("gap", 0.95), ("kept", 0.95)):
        own = [trial for trial in trials if trial.contender.name == name]
        assert [(t.candidate, t.sparsity, t.seed) for t in own] == [(s, sparsity, 100) for s in (0.5, 1.0, 2.0)]
    assert len({trial.name for trial in (*trials, *study.trials())}) == 9 + 2 * (1 + 2 * 2 * 2)


def test_a_tuned_study_has_the_chosen_rates_in_its_settings(tmp_path: Path) -> None:
    study = read(tmp_path, TUNED).tuned({"dense": 2.0, "gap": 0.5, "kept": 1.0})
    chosen = {t.contender.name: t.contender.settings["lr_scale"] for t in study.trials()}
    assert chosen == {"dense": 2.0, "gap": 0.5, "kept": 1.0}
    assert study.contenders[2].settings["state"] == "carry"


def test_nothing_is_tuned_without_being_asked_for(tmp_path: Path) -> None:
    assert list(read(tmp_path, GOOD).tuning_trials()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr_scale = [0.5, 1, 2]", "lr_scale = [0.5, 0.5]", "tune.lr_scale are empty or name one twice"),
        ("lr_scale = [0.5, 1, 2]", "lr_scale = [0.5, -1]", "tune.lr_scale is -1"),
        ("lr_scale = [0.5, 1, 2]\n", "", r"\[tune\] holds seed, sparsity"),
        ("sparsity = 0.95", "sparsity = 1", "sparsities are"),
        ("seed = 100", "seed = 1", "tune.seed 1 is one of the study's"),
        ("task =", 'subject = "rigl"\ntask =', "the subject 'rigl' is not in methods"),
        ("task =", 'test = "yes"\ntask =', "test is 'yes'"),
        ("task =", "flops = 0\ntask =", "flops is 0"),
        ("task =", 'also = "loss"\ntask =', "also is 'loss'"),
    ],
)
def test_a_mistake_in_how_runs_are_judged_is_one_message(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, TUNED.replace(old, new, 1))


def test_a_contender_has_a_method_and_settings_of_its_own(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD)
    kept = study.contenders[2]
    assert (kept.name, kept.method, kept.settings) == ("kept", "gap", {"state": "carry"})
    assert study.task == str(tmp_path / "task.py")
    assert study.settings == {"rounds": 2}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task =", "tusk =", "unknown key 'tusk'"),
        ('task = "task.py"', "task = 3", "task is 3"),
        ("sparsities = [0.8, 0.9]", "sparsities = [0.8, 1.0]", "sparsities are"),
        ("sparsities = [0.8, 0.9]", 'sparsities = "0.8"', "sparsities is '0.8'"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds are empty or name one twice"),
        ("seeds = [0, 1]", "seeds = []", "seeds are empty or name one twice"),
        ('"gap", "kept"]', '"gup", "kept"]', "gup"),
        ('"dense", ', "", "equal operations are a share of those of the method dense"),
        ("[method.kept]", "[method.lost]", r"\[method.lost\] is not in methods"),
        ('"kept"]', '"kept"]\nbudgets = ["time"]', "budgets are"),
        ("[settings]", "[settings", "cannot be read"),
        ('state = "carry"', "update_steps = 5", r"the method gap does not read --update-steps\n  where: .*method.kept"),
    ],
)
def test_a_mistake_is_one_message(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the study cannot be read"):
        read_study(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 1]\nbudgets = 3", "budgets is 3"),
        ("seeds = [0, 1]", 'seeds = [0, 1]\nbudgets = ["epochs", "epochs"]', "budgets are empty or name one twice"),
        ("seeds = [0, 1]", "seeds = [true]", "seeds is [True]"),
        ("rounds = 2", "round = 2", "there is no setting 'round'\n  where: {where}: [settings]\n  to do: did you mean"),
        (
            "rounds = 2",
            "seed = 3",
            "seed is for the study to say\n  where: {where}: [settings]\n  to do: take it out: see seeds",
        ),
        ('state = "carry"', "phase_epoch = 2", "there is no setting 'phase_epoch'\n  where: {where}: [method.kept]"),
        ('state = "carry"', "sparsity = 0.3", "sparsity is for the study to say\n  where: {where}: [method.kept]"),
        ("rounds = 2", 'rounds = 2\n[tune]\nlr_scale = [1]\nsparsity = 0.9\nseed = "x"', "tune.seed is 'x'"),
    ],
)
def test_what_would_show_only_after_hours_is_told_at_once(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        read(tmp_path, GOOD.replace(old, new))
    assert message.format(where=tmp_path / "study.toml") in str(told.value)
