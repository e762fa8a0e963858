"""Task files: each kind of mistake gives one message that names the function, the file and the line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gapfx.errors import GapfxError, PlanError, TaskError, UserError
from gapfx.task import TASK_FORMATS, Task, load_task, split_entry

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a task file; sys.path and sys.modules are as before when the test ends."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(text: str) -> Path:
        path = tmp_path / "task.py"
        path.write_text(text)
        return path

    yield make
    for name in ("gapfx_task_task", "beside_the_task"):
        sys.modules.pop(name, None)


GOOD = """
from dataclasses import dataclass

@dataclass
class Config:
    width: int = 3

def model():
    return Config()

def other():
    return "another"

def data(split):
    return [split]

def loss(model, batch, scale=2):
    return (model, batch, scale)

defaults = {"sparsity": 0.5}
"""


def test_a_task_holds_the_functions_of_its_file(write: Write) -> None:
    path = write(GOOD)
    task = load_task(path)
    task.need("data", "loss")
    assert task.path == path
    assert task.model().width == 3
    assert task.data is not None
    assert task.data("val") == ["val"]
    assert task.loss is not None
    assert task.loss(1, 2) == (1, 2, 2)
    assert [getattr(task, name) for name in ("evaluate", "optimizer", "lr", "collate", "example")] == [None] * 5
    assert task.defaults == {"sparsity": 0.5}
    assert load_task(path, "other").model() == "another"
    assert task.model.__name__ == "model"


def test_modules_beside_the_task_can_be_imported(write: Write, tmp_path: Path) -> None:
    (tmp_path / "beside_the_task.py").write_text("WIDTH = 4\n")
    assert load_task(write("import beside_the_task\ndef model(): return beside_the_task.WIDTH")).model() == 4


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("def model(:\n", "the task file cannot be imported: SyntaxError: ", "(task.py, line 1)"),
        (
            "x = 1\nraise ValueError('bad')\n",
            "cannot be imported: ValueError: bad",
            "task.py:2, raise ValueError('bad')",
        ),
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'", "task.py:1, import"),
        ("import sys\n\nsys.exit(0)\n", "cannot be imported: SystemExit: 0", "task.py:3, sys.exit(0)"),
        ("def modl(): pass\n", "the task has no function model()", "task.py"),
        ("model = 3\n", "model is a int, not a function", "task.py"),
        ("def model(width): pass\n", "model() cannot be called with 0 arguments: missing a required", "task.py"),
        ("def model(): pass\ndef loss(batch): pass\n", "loss() cannot be called with 2 arguments: too many", "task.py"),
        ("def model(): pass\ndef data(): pass\n", "data() cannot be called with 1 arguments", "task.py"),
        ("def model(): pass\ndef lr(step, *, num_steps): pass\n", "lr() cannot be called with 2 arguments", "task.py"),
        ("def model(): pass\ndata = [1, 2]\n", "data is a list, not a function", "task.py"),
        ("def model(): pass\ndefaults = [1]\n", "defaults is a list\n", "task.py\n  to do: make it a dict of settings"),
    ],
)
def test_a_file_that_is_no_task_is_refused(write: Write, text: str, message: str, line: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(write(text))
    assert message in str(caught.value)
    assert line in str(caught.value)


def test_a_path_that_is_no_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"there is no task file .*missing\.py"):
        load_task(tmp_path / "missing.py")
    with pytest.raises(TaskError, match="there is no task file"):
        load_task(tmp_path)
    for name, problem in (("task.txt", r"unknown format '\.txt'"), ("task", "it has no suffix")):
        (tmp_path / name).write_text(GOOD)
        with pytest.raises(TaskError, match=rf"{name} is no task file: {problem}\n  to do: known formats: \.py"):
            load_task(tmp_path / name)


@TASK_FORMATS.register(".mine")
def mine(path: Path) -> Any:
    """A file that holds a width, or nothing of use."""
    text = path.read_text()
    return None if text == "nothing" else {"model": lambda: int(text), "other": lambda: -1, "defaults": {"seed": 3}}


def test_a_registered_format_makes_a_task_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "task.mine"
    path.write_text("7")
    task = load_task(path)
    assert (task.model(), task.defaults, task.data, task.path) == (7, {"seed": 3}, None, path)
    assert load_task(path, "other").model() == -1
    path.write_text("wide")
    with pytest.raises(TaskError, match=r"model\(\) failed: ValueError: .*\n  where: .*task\.mine\n"):
        load_task(path).model()
    path.write_text("nothing")
    with pytest.raises(TaskError, match=r"the format \.mine gives a NoneType in place of the task's functions by name"):
        load_task(path)
    path.write_bytes(b"\xff")
    with pytest.raises(TaskError, match="the task file cannot be read: UnicodeDecodeError: "):
        load_task(path)


def test_an_entry_that_does_not_exist_is_named(write: Write) -> None:
    with pytest.raises(TaskError, match=r"the task has no function big\(\)"):
        load_task(write(GOOD), "big")


@pytest.mark.parametrize(("names", "missing"), [(("data", "loss"), "data(split)"), (("loss",), "loss(model, batch)")])
def test_a_function_that_is_needed_and_missing_is_shown_with_its_arguments(
    write: Write, names: tuple[str, ...], missing: str
) -> None:
    task = load_task(write("def model(): pass"))
    with pytest.raises(TaskError) as caught:
        task.need(*names)
    assert f"the task has no function {missing}\n" in str(caught.value)
    assert f"define {missing}" in str(caught.value)


def call(task: Task, name: str, *args: Any) -> None:
    getattr(task, name)(*args)


FAILING = """
import math, torch

def model():
    return helper()

def helper():
    raise KeyError("width")

def loss(model, batch):
    return torch.zeros(2) + torch.zeros(3)

collate = torch.stack
lr = math.pow
"""


@pytest.mark.parametrize(
    ("name", "args", "message", "where"),
    [
        ("model", (), "model() failed: KeyError: 'width'", 'task.py:8, raise KeyError("width")'),
        ("loss", (1, 2), "loss() failed: RuntimeError: The size of tensor a", "task.py:11, return torch.zeros(2)"),
        ("collate", ([1, 2],), "collate() failed: TypeError: ", "task.py\n"),
        ("lr", (10.0, 1e9), "lr() failed: OverflowError: ", "task.py\n"),
    ],
)
def test_a_function_that_fails_is_named_with_file_and_line(
    write: Write, name: str, args: tuple[Any, ...], message: str, where: str
) -> None:
    with pytest.raises(TaskError) as caught:
        call(load_task(write(FAILING)), name, *args)
    assert message in str(caught.value)
    assert where in str(caught.value)
    assert "--debug shows the whole traceback" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [UserError("mine"), PlanError("mine"), GapfxError("mine")])
def test_errors_of_gapfx_pass_the_guard_unchanged(write: Write, error: GapfxError) -> None:
    path = write("def model(): pass\ndef loss(error, batch):\n    raise error\n")
    with pytest.raises(type(error)) as caught:
        call(load_task(path), "loss", error, None)
    assert caught.value is error


def test_a_gapfx_error_at_import_passes_unchanged(write: Write) -> None:
    with pytest.raises(PlanError, match=r"^mine$"):
        load_task(write("from gapfx.errors import PlanError\nraise PlanError('mine')"))


def test_a_failure_inside_gapfx_is_not_blamed_on_the_task(write: Write) -> None:
    path = write("from gapfx.pattern import kept_count\ndef model():\n    return kept_count('x', 0.5)\n")
    with pytest.raises(TypeError):
        load_task(path).model()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_passes_the_guard(write: Write, stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        load_task(write(f"def model(): raise {stop.__name__}")).model()


@pytest.mark.parametrize(
    ("text", "path", "entry"),
    [
        ("task.py", "task.py", "model"),
        ("a/task.py:big", "a/task.py", "big"),
        ("a:b/task.py", "a:b/task.py", "model"),
        ("a:b/task.py:big", "a:b/task.py", "big"),
        ("task.py:", "task.py:", "model"),
        ("task.py:2", "task.py:2", "model"),
    ],
)
def test_an_entry_is_a_path_and_a_name(text: str, path: str, entry: str) -> None:
    assert split_entry(text) == (Path(path), entry)
