"""A stop in the middle of a long step: what its micro-batches did is undone, and a resumed run makes the step anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import assert_same_bits, finish

# A SIGTERM to one rank as its micro-batch TURN of step STEP comes; STEP 0 is for none.
LONG = """
import os, signal
from pathlib import Path
from torch import nn
from gapfx.runtime import steps
from gapfx.runtime.engine import Engine
from tests.tasks.classify import *
import tests.tasks.classify as classify

steps.LONG_STEP_SECONDS = 0.0
STEP, TURN, RANK = (int(number) for number in os.environ["STOP_AT"].split(":"))
trained, plain = [0], Engine.train_step


def model():
    net = classify.model()
    net.norm = nn.BatchNorm1d(16)
    return net


def train_step(self, batches, *rest):
    trained[0] += 1
    return plain(self, watched(batches), *rest)


def watched(batches):
    for turn, batch in enumerate(batches):
        if trained[0] == STEP and os.environ["RANK"] == str(RANK):
            with Path(__file__).with_name("turns").open("a") as file:
                file.write(str(turn))
            if turn == TURN:
                os.kill(os.getpid(), signal.SIGTERM)
        yield batch


Engine.train_step = train_step
"""
FLAGS = ("--micro-batch", "4", "--rounds", "1", "--state", "carry")


def a_task(folder: Path) -> Path:
    path = folder / "task.py"
    path.write_text(LONG)
    return path


def turns(folder: Path) -> str:
    """Micro-batches that the step began in which the stop came."""
    return (folder / "turns").read_text()


def check(folder: Path, stop_at: str, *flags: object) -> str:
    """What a run says that is stopped there; resumed it must end in the bits of one that was not."""
    task, whole, cut = a_task(folder), folder / "whole", folder / "cut"
    assert finish("sparsify", task, "--out", whole, *FLAGS, *flags, STOP_AT="0:0:0")[0] == 0
    code, _, err = finish("sparsify", task, "--out", cut, *FLAGS, *flags, STOP_AT=stop_at)
    assert code == 130, err
    assert finish("sparsify", task, "--out", cut, *FLAGS, *flags, "--resume", STOP_AT="0:0:0")[0] == 0
    assert_same_bits(whole, cut)
    return err


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.distributed)])
def test_a_step_that_is_broken_off_leaves_no_trace(zero: int, tmp_path: Path) -> None:
    said = check(tmp_path, "6:2:0", "--zero", zero)
    assert turns(tmp_path) == "012"
    assert "stopped after step 5; continue with --resume" in said


@pytest.mark.parametrize(("step", "before"), [(9, 8), pytest.param(1, 0, marks=pytest.mark.distributed)])
def test_in_the_first_step_of_a_phase_there_is_nothing_new_to_save(step: int, before: int, tmp_path: Path) -> None:
    assert f"stopped after step {before};" in check(tmp_path, f"{step}:1:0")
    assert turns(tmp_path) == "01"


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [("--zero", 1), ("--zero", 2), ("--zero", 3), ("--method", "pgap")])
def test_any_rank_stops_all_of_them(flags: tuple[object, ...], tmp_path: Path) -> None:
    check(tmp_path, "6:1:1", "--nproc", 2, *flags)
    assert turns(tmp_path) == "01"
