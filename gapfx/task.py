"""The task file: a file with `model()` and, for training, `data(split)` and `loss(model, batch)`.

Python files are the format that gapfx brings; others are registered in TASK_FORMATS.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gapfx.errors import GapfxError, TaskError
from gapfx.registry import Registry

# What stands in a task file, by name: functions of the task, other models, and `defaults`.
Names = Mapping[str, Any]
TaskFormat = Callable[[Path], Names]

# By the suffix of the file's name.
TASK_FORMATS: Registry[TaskFormat] = Registry("task format")

_HERE = Path(__file__).parent
_NUM_ARGUMENTS = {"model": 0, "data": 1, "loss": 2, "evaluate": 2, "optimizer": 1, "lr": 2, "collate": 1, "example": 0}


@dataclass(frozen=True)
class Task:
    """The functions of a task file; those that it does not have are None. `entry` is the name of `model` in the file.

    An exception that one of them raises becomes a TaskError that names the function, the file and the line.
    """

    path: Path
    model: Callable[[], Any]
    data: Callable[[str], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Any, Any], Any] | None = None
    optimizer: Callable[[Any], Any] | None = None
    lr: Callable[[int, int], float] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    example: Callable[[], Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    entry: str = "model"

    def need(self, *names: str) -> None:
        """Raise TaskError unless the task has these functions."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            signature = {"data": "data(split)", "loss": "loss(model, batch)"}.get(missing[0], missing[0])
            raise TaskError(f"the task has no function {signature}", where=str(self.path), fix=f"define {signature}")


def load_task(path: Path, entry: str = "model") -> Task:
    """The task in a file of a known format; `entry` is the name of its model function. Raises TaskError."""
    found = _names(path)
    functions = {"model": found.get(entry)}
    functions |= {name: found.get(name) for name in _NUM_ARGUMENTS if name != "model"}
    if functions["model"] is None:
        raise TaskError(
            f"the task has no function {entry}()", where=str(path), fix="define model() or name another with --entry"
        )
    guarded = {name: _guard(name, function, path) for name, function in functions.items() if function is not None}
    defaults = found.get("defaults", {})
    if not isinstance(defaults, Mapping):
        raise TaskError(f"defaults is a {type(defaults).__name__}", where=str(path), fix="make it a dict of settings")
    rest = cast(dict[str, Any], guarded)
    return Task(path=path, defaults=cast(Mapping[str, Any], defaults), entry=entry, **rest)


def split_entry(text: str) -> tuple[Path, str]:
    """`file.py` or `file.py:name` -> (path, name of the model function)."""
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and name.isidentifier() else (Path(text), "model")


def _names(path: Path) -> Names:
    if not path.is_file():
        raise TaskError(f"there is no task file {path}", fix="give the path of a Python file with a model() function")
    if path.suffix not in TASK_FORMATS:
        raise TaskError(
            f"{path} is no task file: " + (f"unknown format {path.suffix!r}" if path.suffix else "it has no suffix"),
            fix=f"known formats: {', '.join(TASK_FORMATS)}",
        )
    read = TASK_FORMATS[path.suffix]
    try:
        names = cast(Any, read(path))
    except GapfxError:
        raise
    except (Exception, SystemExit) as error:
        verb = "imported" if path.suffix == ".py" else "read"
        raise _task_error(f"the task file cannot be {verb}", error, path) from error
    if not isinstance(names, Mapping):
        what = f"the format {path.suffix} gives a {type(names).__name__} in place of the task's functions by name"
        raise TaskError(what, where=str(path), fix=f"mend {read.__module__}")
    return cast(Names, names)


@TASK_FORMATS.register(".py")
def python_file(path: Path) -> Names:
    """Names of a Python module, which is run; modules beside it can be imported."""
    spec = importlib.util.spec_from_file_location(f"gapfx_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return vars(module)


def _guard(name: str, function: object, path: Path) -> Callable[..., Any]:
    if not callable(function):
        raise TaskError(f"{name} is a {type(function).__name__}, not a function", where=str(path))
    _check_arguments(name, function, path)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except GapfxError:
            raise
        except Exception as error:
            if _is_own_fault(error):
                raise
            raise _task_error(f"{name}() failed", error, path) from error

    return call


def _check_arguments(name: str, function: Callable[..., Any], path: Path) -> None:
    count = _NUM_ARGUMENTS.get(name, 0)
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        raise TaskError(
            f"{name}() cannot be called with {count} arguments: {error}",
            where=str(path),
            fix="see the task file section of the README for its arguments",
        ) from error
    except ValueError:  # a builtin without a signature
        return


def _is_own_fault(error: BaseException) -> bool:
    """Whether the innermost frame is gapfx's own code; the first one is the guard, which a builtin leaves alone."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_HERE)


def _task_error(what: str, error: BaseException, path: Path) -> TaskError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    where = f"{path}:{frames[-1].lineno}, {frames[-1].line}" if frames else str(path)
    return TaskError(
        f"{what}: {type(error).__name__}: {error}", where=where, fix="mend the task; --debug shows the whole traceback"
    )
