"""Runs that other launchers start: torchrun, the deepspeed launcher, two nodes, and a restart after a lost rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT, TASK, assert_same_bits, events, finish, start, stops_in_evaluation

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent
GRACE_SECONDS = 30
DIES_ONCE = """
import os
from collections.abc import Iterator
from pathlib import Path
from tests.tasks.classify import *
from tests.tasks.classify import loss as plain_loss
SEEN = Path(__file__).with_name("died")
calls = [0]


def loss(model, batch):
    calls[0] += 1
    if calls[0] == 30 and os.environ["RANK"] == "1" and not SEEN.exists():
        SEEN.touch()
        os._exit(1)
    return plain_loss(model, batch)
"""

RAISES = """
import os
from tests.tasks.classify import *
from tests.tasks.classify import loss as plain_loss
calls = [0]


def loss(model, batch):
    calls[0] += 1
    if calls[0] == 12 and os.environ["RANK"] == "1":
        raise ValueError("a token out of range")
    return plain_loss(model, batch)
"""


def launched(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-3000:]


@pytest.fixture
def port() -> Iterator[int]:
    """A free port, kept from everyone but a rank that listens on it."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "run"
    code, _, err = finish("sparsify", TASK, "--out", out, "--nproc", 2)
    assert code == 0, err
    return out


def test_torchrun_gives_the_same_bits(two_ranks: Path, tmp_path: Path) -> None:
    torchrun = (BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "-m", "gapfx")
    ended(launched(*torchrun, "sparsify", TASK, "--out", tmp_path / "run"))
    assert_same_bits(two_ranks, tmp_path / "run")


def test_the_deepspeed_launcher_gives_the_same_bits(two_ranks: Path, tmp_path: Path, port: int) -> None:
    deepspeed = (BIN / "deepspeed", "--num_gpus", 2, "--master_port", port, "--module", "gapfx")
    ended(launched(*deepspeed, "sparsify", TASK, "--out", tmp_path / "run"))
    assert_same_bits(two_ranks, tmp_path / "run")


def test_two_nodes_give_the_same_bits(two_ranks: Path, tmp_path: Path, port: int) -> None:
    common = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port)
    nodes = [
        launched(
            *(BIN / "torchrun", *common, "--node_rank", node),
            *("-m", "gapfx", "sparsify", TASK, "--out", tmp_path / "run"),
        )
        for node in range(2)
    ]
    for node in nodes:
        ended(node)
    assert_same_bits(two_ranks, tmp_path / "run")


def test_torchrun_restarts_after_a_lost_rank_and_the_run_goes_on(two_ranks: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(DIES_ONCE)
    torchrun = (BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "--max-restarts", 1, "-m", "gapfx")
    ended(launched(*torchrun, "sparsify", task, "--out", tmp_path / "run"))
    assert (tmp_path / "died").exists()
    assert len(events(tmp_path / "run", "resume")) == 1
    assert_same_bits(two_ranks, tmp_path / "run")


def test_what_one_rank_alone_did_wrong_is_told_by_it_though_the_others_lose_it_first(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(RAISES)
    code, _, err = finish("sparsify", task, "--out", tmp_path / "run", "--nproc", 2)
    assert "[rank 1] error: loss() failed: ValueError: a token out of range" in err
    assert code == 2


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_saves_and_ends_in_time(nproc: int, two_ranks: Path, tmp_path: Path) -> None:
    flags = ("--out", tmp_path / "run", "--nproc", nproc)
    process = start("sparsify", TASK, *flags)
    deadline = time.monotonic() + 60
    while len(_lines(tmp_path / "run")) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    process.communicate(timeout=GRACE_SECONDS)
    assert time.monotonic() - asked < GRACE_SECONDS
    assert process.returncode == 130
    code, _, err = finish("sparsify", TASK, *flags, "--resume")
    assert code == 0, err
    if nproc == 2:
        assert_same_bits(two_ranks, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "number", "rank", "num_told"),
    [
        (("--zero", 1), 1, 1, 0),
        (("--zero", 3), 2, 1, 1),
        (("--zero", 3), 3, 0, 2),
        (("--method", "pgap", "--groups", 2), 1, 0, 0),
        (("--method", "pgap", "--groups", 2), 1, 1, 2),  # the other replica is not evaluated
    ],
    ids=["inside a phase", "before a prune, stage 3", "after a prune, stage 3", "a replica", "merged replicas"],
)
def test_a_stop_that_one_rank_hears_of_in_an_evaluation_ends_all_of_them(
    flags: tuple[object, ...], number: int, rank: int, num_told: int, tmp_path: Path
) -> None:
    flags = ("--rounds", 1, "--eval-epochs", 0.25, "--nproc", 2, *flags)
    task, cut = stops_in_evaluation(tmp_path, number, rank), tmp_path / "cut"
    code, _, err = finish("sparsify", task, "--out", cut, *flags)
    assert code == 130, err
    assert "stopped after step" in err
    assert len(events(cut, "eval")) == num_told
    code, _, err = finish("sparsify", task, "--out", cut, *flags, "--resume")
    assert code == 0, err
    code, _, err = finish("sparsify", task, "--out", tmp_path / "whole", *flags)
    assert code == 0, err
    assert_same_bits(tmp_path / "whole", cut)
    assert _metrics(tmp_path / "whole") == _metrics(cut)


def _metrics(run: Path) -> list[tuple[object, ...]]:
    return [(event["step"], event["sparsity"], event["metrics"]) for event in events(run, "eval")]


def _lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []
