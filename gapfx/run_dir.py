"""The directory of a run: what is in it, when it may be written, and what it holds after a crash."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from gapfx.errors import UserError
from gapfx.plan import Plan
from gapfx.settings import Settings, merge

# Settings that a resumed run may change: they alter neither what is computed, but for rounding, nor the files that
# are already there. `kernels` is not among them: a resumed run follows what its plan holds,
# which was chosen with it, without measuring.
FREE_ON_RESUME = ("log_every", "log_to", "keep_checkpoints", "nproc", "zero", "form", "deepspeed", "calibrate")


_OWN_FILES = (
    "config.json",
    "plan.json",
    "task.json",
    "metrics.jsonl",
    "model.safetensors",
    "model.gapfx",
    "summary.json",
    "report.html",
    "wandb.json",
)
_OWN_FOLDERS = ("checkpoints", "tensorboard", "wandb")


@dataclass(frozen=True)
class RunDir:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings, a flat JSON object."""
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        """The plan with its phases."""
        return self.path / "plan.json"

    @property
    def task(self) -> Path:
        """Where the task file was when the run began, and the name of its model function."""
        return self.path / "task.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for everything that happened."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Dense weights with zeros in place, original FQNs."""
        return self.path / "model.safetensors"

    @property
    def sparse(self) -> Path:
        """The same as live values and masks, see gapfx.io.sparse_file."""
        return self.path / "model.gapfx"

    @property
    def summary(self) -> Path:
        """Facts of the finished run."""
        return self.path / "summary.json"

    def check_new(self, *, force: bool) -> None:
        """Raise UserError unless a new run may be written here: never over a run without `force`."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            if not self._is_run():
                raise UserError(
                    f"{self.path} exists and is not a run",
                    fix="give another --out; gapfx deletes nothing that it did not make",
                )
            if not force:
                raise UserError(
                    f"{self.path} already holds a run",
                    fix="continue it with --resume, replace it with --force, or give another --out",
                )

    def create(self, settings: Settings, plan: Plan, task: tuple[Path, str] | None = None, *, force: bool) -> None:
        """Make the directory of a new run, with `force` in the place of an older one. Raises UserError.

        `task` is the path of the task file and the name of its model function.
        """
        self.check_new(force=force)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in _OWN_FILES:
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.path / name for name in _OWN_FOLDERS):
                if folder.exists():
                    shutil.rmtree(folder)
            write_atomically(self.config, settings.to_json())
            write_atomically(self.plan, plan.to_json())
            if task is not None:
                write_atomically(self.task, json.dumps({"path": str(task[0].resolve()), "entry": task[1]}))
        except OSError as error:
            raise UserError(f"the run directory cannot be made: {error}", fix="give another --out") from error

    def _is_run(self) -> bool:
        """Many programs call a file config.json: only one that holds settings marks a run."""
        try:
            self.settings()
        except UserError:
            return False
        return True

    def settings(self) -> Settings:
        """The settings that the run was started with. Raises UserError when there is no run here."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run to continue", fix="start it without --resume, or check --out")
        return merge((str(self.config), _read_json(self.config)))

    def check_resume(self, asked: Settings) -> None:
        """Raise UserError when a setting that shapes the run differs from what it was started with."""
        was = self.settings()
        for name in vars(was):
            if name not in FREE_ON_RESUME and getattr(was, name) != getattr(asked, name):
                raise UserError(
                    f"the run was started with {name} {getattr(was, name)!r}, not {getattr(asked, name)!r}",
                    where=str(self.config),
                    fix="continue with the same settings, or start another run with another --out",
                )

    def check_plan(self, asked: Path | None, plan: Plan | None) -> None:
        """Raise UserError when a run that has a plan is to be continued by another one.

        The run has added to the plan that it was given, phases and forms and kernels: those are not compared.
        """
        if asked is None or plan is None:
            return
        given = Plan.load(asked)
        if _pruned_weights(given) != _pruned_weights(plan) or given.phases not in ((), plan.phases):
            raise UserError(
                f"the run has another plan than {asked}",
                where=str(self.plan),
                fix="continue without --plan, or start another run with --out",
            )

    def saved_plan(self) -> Plan | None:
        """The plan of a run that got so far."""
        return Plan.load(self.plan) if self.plan.is_file() else None

    def saved_task(self) -> tuple[Path, str]:
        """Path of the task file when the run began, and the name of its model function. Raises UserError."""
        fix = "give the model itself"
        if not self.task.is_file():
            raise UserError(f"the run does not say which task it is of: {self.task} is missing", fix=fix)
        found = _read_json(self.task)
        if not all(isinstance(found.get(name), str) for name in ("path", "entry")):
            raise UserError(f"{self.task} is damaged: it holds no path and entry", fix=fix)
        return Path(found["path"]), found["entry"]

    def rewind_metrics(self, step: int) -> None:
        """Cut metrics.jsonl after the checkpoint of `step`; later lines, and torn ones, are written anew.

        A crash between a checkpoint and its line leaves no such line: then everything before it stays.
        """
        events = self.events()
        keep = [i for i, e in enumerate(events, start=1) if e.get("event") == "checkpoint" and e.get("step") == step]
        end = keep[-1] if keep else next((i for i, e in enumerate(events) if _is_after(e, step)), len(events))
        write_atomically(self.metrics, "".join(json.dumps(event) + "\n" for event in events[:end]))

    def peaks(self) -> list[int]:
        """The most memory that each rank had in any process of the run, as far as metrics.jsonl tells."""
        told = (event.get("peak_rss_bytes_by_rank", []) for event in self.events())
        return [max(rank) for rank in zip_longest(*told, fillvalue=0)]

    def events(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.is_file() else []
        return [event for event in map(_event, lines) if event]


def _pruned_weights(plan: Plan) -> list[list[tuple[str, float, str]]]:
    return [[(weight.fqn, weight.sparsity, weight.pattern) for weight in group.weights] for group in plan.groups]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one that is whole at any moment."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _event(line: str) -> dict[str, Any]:
    try:
        event: Any = json.loads(line)
    except ValueError:
        return {}
    return cast(dict[str, Any], event) if isinstance(event, dict) else {}


def _is_after(event: dict[str, Any], step: int) -> bool:
    """Whether the event was written after the state of `step` was complete."""
    at = event.get("step", 0)
    return at > step or (at == step and event.get("event") in ("phase", "resume"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}", fix="restore it, or start again with another --out") from error
    return cast(dict[str, Any], data)
