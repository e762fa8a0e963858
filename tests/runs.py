"""Running the command line in this process or as one of its own, and reading what a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gapfx.cli import main
from gapfx.runtime.launch import RANK_VARIABLES

ROOT = Path(__file__).parent.parent
TASK = ROOT / "tests" / "tasks" / "classify.py"


STOPS_IN_EVALUATION = """
import os, signal
from pathlib import Path
from tests.tasks.classify import *
from tests.tasks.classify import evaluate as plain_evaluate
SEEN = Path(__file__).with_name("stopped")
calls = [0]


def evaluate(model, loader):
    calls[0] += 1
    return plain_evaluate(model, batches(loader))


def batches(loader):
    for count, batch in enumerate(loader):
        if calls[0] == {number} and os.environ["RANK"] == "{rank}" and count == 5 and not SEEN.exists():
            SEEN.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
"""


def gapfx(*arguments: object) -> int:
    """Exit code of `gapfx ARGUMENTS` in this process, which is no rank of later runs."""
    with no_rank_left_behind():
        return main([str(argument) for argument in arguments])


@contextmanager
def no_rank_left_behind() -> Generator[None]:
    """What makes this process a rank meanwhile, is undone: processes that tests start later shall not join."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """`gapfx ARGUMENTS` as a process of its own, in its own process group."""
    command = [sys.executable, "-m", "gapfx", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stops_in_evaluation(folder: Path, number: int, rank: int = 0) -> Path:
    """A task of which `rank` gets a SIGTERM in the middle of its evaluation `number`, counted from 1, once."""
    path = folder / "task.py"
    path.write_text(STOPS_IN_EVALUATION.replace("{number}", str(number)).replace("{rank}", str(rank)))
    return path


def finish(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `gapfx ARGUMENTS` as a process of its own."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def weights(run: Path) -> dict[str, Tensor]:
    """The exported model."""
    return load_file(run / "model.safetensors")


def summary(run: Path) -> dict[str, Any]:
    """The facts of a finished run."""
    return json.loads((run / "summary.json").read_text())


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def assert_same_bits(run: Path, other: Path) -> None:
    """Two runs exported the same numbers."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [fqn for fqn in ours if not torch.equal(ours[fqn], theirs[fqn])] == []
