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


def test_the_control_is_trained_once_a_seed_and_all_else_once_a_budget(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD)
    names = [trial.name for trial in study.trials()]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 2 * 2)
    assert names[:3] == ["dense-0-0-epochs", "gap-0.8-0-epochs", "gap-0.9-0-epochs"]
    assert "dense-0-0-flops" not in names
    assert [name for name in names if name.startswith("kept")][:2] == ["kept-0.8-0-epochs", "kept-0.9-0-epochs"]


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
        ('"dense", ', "", "equal operations are those of the method dense"),
        ("[method.kept]", "[method.lost]", r"\[method.lost\] is not in methods"),
        ('"kept"]', '"kept"]\nbudgets = ["time"]', "budgets are"),
        ("[settings]", "[settings", "cannot be read"),
    ],
)
def test_a_mistake_is_one_message(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the study cannot be read"):
        read_study(tmp_path / "none.toml")
