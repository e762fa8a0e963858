"""Running the command line in this process or as one of its own, and reading what a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gapfx.cli import main

ROOT = Path(__file__).parent.parent
TASK = ROOT / "tests" / "tasks" / "classify.py"


def gapfx(*arguments: object) -> int:
    """Exit code of `gapfx ARGUMENTS` in this process."""
    return main([str(argument) for argument in arguments])


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
