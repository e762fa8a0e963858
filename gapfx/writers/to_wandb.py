"""Weights & Biases: one run there for a run here, whose id is in RUN/wandb.json."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import wandb

from gapfx.errors import UserError
from gapfx.writers.points import Points
from gapfx.writers.writer import Opening, Writer

STATE, FOLDER = "wandb.json", "wandb"
PROJECT = "gapfx"
# For what is not sent yet at the end, also of a run that a scheduler kills half a minute after it asks it to stop.
FINISH_SECONDS = 20


class WeightsAndBiases(Writer):
    """Logs with the step of gapfx as the x-axis. WANDB_MODE, WANDB_PROJECT and the like are W&B's own variables.

    W&B keeps what it was told, so points that a resumed run makes a second time are not told again.
    """

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        path = opening.folder / STATE
        run_id = secrets.token_hex(4)
        if path.is_file():
            state: dict[str, Any] = json.loads(path.read_text())
            run_id, self.told = state["id"], state["told"]
            self.replay_from = sys.maxsize
            for points in opening.before:
                self.told |= {tag: max(points.step, self.told.get(tag, 0)) for tag in (*points.scalars, *points.texts)}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or opening.folder.name,
            id=run_id,
            resume="allow",
            dir=str(opening.folder),
            config=dict(opening.settings),
            # The terminal is the progress's; messages and the address of the run go to stderr.
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_SECONDS),
        )
        self._run.define_metric("*", step_metric="step")
        _write(path, json.dumps({"id": run_id, "told": self.told}))

    @classmethod
    def check(cls, *, is_new: bool) -> None:
        """Log in where that is needed; a run that goes on was let in when it began."""
        if not is_new or wandb.setup().settings.mode not in ("online", "shared"):
            return
        try:
            wandb.login()
        except Exception as error:
            raise UserError(
                f"W&B does not let you in: {error}",
                where="--log-to wandb",
                fix="run `wandb login`, or set WANDB_MODE=offline and send the run later by `wandb sync`",
            ) from error

    def write(self, points: Points) -> None:
        """Hand them to the process that sends them, which stores them on the disk first."""
        self._run.log({"step": points.step, **points.scalars, **points.texts})

    def close(self, *, is_done: bool) -> None:
        """Send what is left, for a while."""
        self._run.finish(exit_code=0 if is_done else 1)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.replace(path)
