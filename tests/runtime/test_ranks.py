"""Runs of several processes: equal to one process, and resumable after any of them dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from gapfx.runtime.launch import run_ranks
from tests.runs import TASK, assert_same_bits, finish, start, summary, weights

pytestmark = pytest.mark.distributed
SAME_BATCH = ("--batch-size", 32, "--micro-batch", 16)
LEAVE = """
import torch
from gapfx.runtime.engine import process_group
with process_group():
    torch.distributed.all_reduce(torch.ones(1))
    torch.ones(2, requires_grad=True).sum().backward()
"""


THREADS_AT_EXIT = """
import atexit, os
from pathlib import Path
from tests.tasks.classify import *


def tell():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(__file__).with_name("rank-" + os.environ["RANK"]).write_text(" ".join(sorted(names)))


if "RANK" in os.environ:
    atexit.register(tell)
"""


def run(out: Path, *flags: object) -> Path:
    code, _, err = finish("sparsify", TASK, "--out", out, *flags)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are held against."""
    return run(tmp_path_factory.mktemp("one") / "run", *SAME_BATCH, "--form", "masked")


@pytest.mark.parametrize(
    ("zero", "form"),
    [(0, "compact"), (1, "compact"), (2, "compact"), (3, "compact"), (1, "masked"), (3, "masked")],
)
def test_two_ranks_equal_one_with_the_same_global_batch(zero: int, form: str, one_rank: Path, tmp_path: Path) -> None:
    two = run(tmp_path / "two", *SAME_BATCH, "--nproc", 2, "--zero", zero, "--form", form)
    assert_near(one_rank, two)
    assert (summary(two)["world_size"], summary(two)["zero_stage"]) == (2, zero)


def assert_near(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert max(float((ours[fqn] - theirs[fqn]).abs().max()) for fqn in ours) <= 1e-6
    assert [fqn for fqn in ours if not bool(((ours[fqn] == 0) == (theirs[fqn] == 0)).all())] == []


def test_a_warm_up_of_regrown_weights_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    flags = (*SAME_BATCH, "--state", "carry", "--regrow-warmup", 5)
    one = run(tmp_path / "one", *flags)
    for zero in (0, 2, 3):
        assert_near(one, run(tmp_path / str(zero), *flags, "--nproc", 2, "--zero", zero))


@pytest.mark.parametrize(
    ("zero", "added"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"offload_optimizer": {"device": "cpu"}, "overlap_comm": True}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 500, "stage": "auto"}),
    ],
    ids=["offload, stage 1", "offload, stage 2", "offload of both, stage 3", "small parts, stage 3"],
)
def test_what_a_deepspeed_file_adds_changes_no_result(
    zero: int, added: dict[str, object], one_rank: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": added, "gradient_clipping": "auto"}))
    flags = ("--nproc", 2, "--zero", zero, "--form", "compact", "--deepspeed", path)
    assert_near(one_rank, run(tmp_path / "two", *SAME_BATCH, *flags))


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_in_bf16_end_sparse(zero: int, tmp_path: Path) -> None:
    two = run(tmp_path / "two", "--nproc", 2, "--dtype", "bf16", "--zero", zero, "--state", "reset")
    assert summary(two)["sparsity_actual"] == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("--nproc", 2, "--zero", 1), ("--nproc", 4, "--zero", 3)),
        (("--nproc", 2, "--zero", 1), ("--nproc", 1, "--zero", 0)),
        (("--nproc", 4, "--zero", 3, "--form", "compact"), ("--nproc", 2, "--zero", 2, "--form", "masked")),
    ],
    ids=["2 ranks at 1 to 4 at 3", "2 ranks at 1 to 1 at 0", "4 ranks at 3 to 2 at 2"],
)
def test_a_run_continues_at_another_number_of_ranks_and_stage(
    first: tuple[object, ...], then: tuple[object, ...], tmp_path: Path
) -> None:
    flags = ("--batch-size", 32, "--micro-batch", 8, "--state", "carry", "--clip", 0)
    whole, cut = run(tmp_path / "whole", *flags), run(tmp_path / "cut", *flags, *first)
    steps = sorted((cut / "checkpoints").glob("step-*"))
    for path in steps[1:]:
        shutil.rmtree(path)
    for name in ("model.safetensors", "summary.json", "report.html"):
        (cut / name).unlink()
    run(cut, *flags, *then, "--resume")
    assert_near(whole, cut)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_run_continues_to_the_same_bits(nproc: int, tmp_path: Path) -> None:
    flags = ("--nproc", nproc, "--checkpoint-every", 3)
    whole = run(tmp_path / "whole", *flags)
    cut, draw = tmp_path / "cut", random.Random(nproc)
    for kill in range(3):
        resume = ["--resume"] if (cut / "config.json").exists() else []
        process = start("sparsify", TASK, "--out", cut, *flags, *resume)
        _wait_for_lines(cut, 4 + 9 * kill + draw.randrange(6))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(0.5)  # ranks die with their launcher
    run(cut, *flags, "--resume")
    assert_same_bits(whole, cut)


def test_a_rank_that_dies_ends_the_run_with_its_name(tmp_path: Path) -> None:
    process = start("sparsify", TASK, "--out", tmp_path / "run", "--nproc", 2, "--phase-epochs", 20)
    _wait_for_lines(tmp_path / "run", 8)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1" in err
    assert "SIGKILL" in err or "signal 9" in err


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_leaves_a_resumable_run(nproc: int, tmp_path: Path) -> None:
    flags = ("--nproc", nproc, "--phase-epochs", 2)
    whole, cut = run(tmp_path / "whole", *flags), tmp_path / "cut"
    process = start("sparsify", TASK, "--out", cut, *flags)
    _wait_for_lines(cut, 6)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    run(cut, *flags, "--resume")
    assert_same_bits(whole, cut)


def test_ranks_leave_their_group_before_they_end() -> None:
    # A process that ends inside of its group aborts in every third run or so.
    assert [run_ranks([sys.executable, "-c", LEAVE], 2) for _ in range(6)] == [0] * 6


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_no_thread_of_a_group_lives_on_when_a_rank_ends(zero: int, tmp_path: Path) -> None:
    # An abort takes a thread that drops a tensor at that very moment; the cause is any thread that is still there.
    task = tmp_path / "task.py"
    task.write_text(THREADS_AT_EXIT)
    code, _, err = finish("sparsify", task, "--out", tmp_path / "run", "--nproc", 2, "--zero", zero)
    assert code == 0, err
    left = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(2)]
    assert [[name for name in names if "gloo" in name] for names in left] == [[], []]


def _wait_for_lines(out: Path, num: int) -> None:
    deadline, metrics = time.monotonic() + 90, out / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= num:
            return
        time.sleep(0.02)
    raise AssertionError(f"{metrics} did not get {num} lines")
