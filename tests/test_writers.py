"""Events in TensorBoard and Weights & Biases: what they hold, also after a resume, and that neither kills a run."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.util import tensor_util
from wandb.proto import wandb_internal_pb2

from gapfx.plan import Group, Plan, Weight
from gapfx.writers.points import Points, Reader
from gapfx.writers.writer import WRITERS, Opening, Writer
from tests.runs import TASK, assert_same_bits, events, finish, gapfx

SHORT = ("--rounds", 1, "--checkpoint-every", 5, "--log-every", 4, "--keep-checkpoints", 99)
NUM_STEPS = 40  # of these runs, with phases of 8


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def trained(run: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", run, *SHORT, *flags) == 0
    return run


def cut_back(run: Path, step: int) -> None:
    """What a crash leaves some steps after the checkpoint of `step`."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (run / "summary.json").unlink()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of TensorBoard."""
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags: Any = found.Tags()["scalars"]
    return {tag: [(item.step, item.value) for item in found.Scalars(tag)] for tag in tags}


def texts(run: Path, name: str) -> list[tuple[int, str]]:
    # What the program tensorboard reads by; the other one forgets no text.
    found = PluginAccumulator(str(run / "tensorboard")).Reload()
    values: list[tuple[int, Any]] = [
        (item.step, tensor_util.make_ndarray(item.tensor_proto).item())
        for item in found.Tensors(f"{name}/text_summary")
    ]
    return [(step, value.decode()) for step, value in values]


def records(path: Path) -> Iterator[Any]:
    """Records of a file of W&B: 7 bytes, then the log of LevelDB, in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(run: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids of the runs of W&B, and what they were told, in order."""
    ids, told = set[str](), list[dict[str, Any]]()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                told.append({name: json.loads(value) for name, value in items.items()})
    return ids, told


def test_tensorboard_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--log-to", "tensorboard")
    curves, steps = scalars(run), events(run, "step")
    for name in ("loss", "lr", "grad_norm"):
        assert curves[f"train/{name}"] == [(e["step"], pytest.approx(e[name])) for e in steps]
    assert [step for step, _ in curves["sparsity/all"]] == [e["step"] for e in steps]
    assert curves["sparsity/all"][-1][1] == pytest.approx(0.8, abs=0.01)
    assert all(speed > 0 for _, speed in curves["speed/steps_per_second"])
    pruned = [e["step"] for e in events(run, "prune")]
    assert [step for step, _ in curves["pruned/accuracy"]] == pruned == [8, 16, 24]
    # An evaluation before each of the prunes, and one after it.
    of_step = {step: [e["metrics"]["accuracy"] for e in events(run, "eval") if e["step"] == step] for step in pruned}
    before, after = dict(curves["eval/accuracy"]), dict(curves["pruned/accuracy"])
    assert {step: [before[step], after[step]] for step in pruned} == {k: pytest.approx(v) for k, v in of_step.items()}
    groups = [tag for tag in curves if tag.startswith("sparsity/group/")]
    assert [[step for step, _ in curves[tag]] for tag in sorted(groups)] == [[8], [16], [24]]
    assert all(curves[tag][0][1] == pytest.approx(0.8, abs=0.01) for tag in groups)
    peak = max(events(run, "checkpoint")[-1]["peak_rss_bytes_by_rank"]) / 2**20
    assert curves["memory/peak_mib"][-1] == (NUM_STEPS, pytest.approx(peak, rel=1e-6))
    phases = texts(run, "phase")
    assert [step for step, _ in phases] == [0, 8, 16, 24]
    assert phases[0][1].startswith("1/4 round 1 group 1; grows ")


@pytest.mark.parametrize("step", [20, 16])
def test_a_resumed_run_goes_on_in_tensorboard_without_doubled_or_lost_points(step: int, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--log-to", "tensorboard")
    before, phases = scalars(run), texts(run, "phase")
    cut_back(run, step)
    trained(run, "--log-to", "tensorboard", "--resume")
    after = scalars(run)
    assert len(list((run / "tensorboard").iterdir())) == 2
    for tag in before.keys() - {"speed/steps_per_second", "memory/peak_mib"}:
        assert after[tag] == before[tag]
    assert [at for at, _ in after["memory/peak_mib"]] == [at for at, _ in before["memory/peak_mib"]]
    assert texts(run, "phase") == phases
    assert texts(run, "note") == [(step, f"resumed at step {step}")]


@pytest.mark.distributed
def test_rank_0_alone_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = finish("sparsify", TASK, "--out", run, *SHORT, "--log-to", "tensorboard,wandb", "--nproc", 2)
    assert code == 0, err
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert [step for step, _ in scalars(run)["train/loss"]] == [e["step"] for e in events(run, "step")]


@pytest.mark.slow
def test_a_writer_that_joins_at_a_resume_gets_the_whole_history(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    assert not (run / "tensorboard").exists()
    cut_back(run, 20)
    trained(run, "--log-to", "tensorboard,wandb", "--resume")
    steps = [e["step"] for e in events(run, "step")]
    assert [step for step, _ in scalars(run)["train/loss"]] == steps
    assert [point["step"] for point in history(run)[1] if "train/loss" in point] == steps


def test_a_resumed_run_is_the_same_run_of_wandb_and_tells_nothing_twice(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--log-to", "wandb")
    cut_back(run, 20)
    trained(run, "--log-to", "wandb", "--resume")
    cut_back(run, 10)
    trained(run, "--log-to", "wandb", "--resume")
    ids, told = history(run)
    assert ids == {json.loads((run / "wandb.json").read_text())["id"]}
    count = Counter((point["step"], tag) for point in told for tag in point if tag[0] != "_" and tag not in _MANY)
    assert set(count.values()) == {1}
    for name in ("loss", "lr"):
        wanted = [(e["step"], pytest.approx(e[name])) for e in events(run, "step")]
        assert [(p["step"], p[f"train/{name}"]) for p in told if f"train/{name}" in p] == wanted
    assert [p["phase"][:3] for p in told if "phase" in p] == ["1/4", "2/4", "3/4", "4/4"]


_MANY = ("step", "note")


@pytest.mark.slow
def test_force_takes_away_what_writers_left(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--log-to", "tensorboard,wandb")
    first = history(run)[0]
    trained(run, "--force", "--log-to", "tensorboard,wandb")
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert not history(run)[0] & first


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    monkeypatch.delitem(sys.modules, f"gapfx.writers.to_{name}", raising=False)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--log-to", name) == 2
    err = capsys.readouterr().err
    assert f"events cannot be written to {name}: " in err
    assert f"to do: pip install -c constraints.txt 'gapfx[{name}]', or leave it out" in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_writer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--log-to", "tensorbord") == 2
    assert "unknown writer 'tensorbord'\n  to do: did you mean 'tensorboard'? known: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_asks_for_a_login_before_anything_is_written(tmp_path: Path) -> None:
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "run", "--log-to", "wandb", **environment)
    assert code == 2
    assert "W&B does not let you in: " in err
    assert "WANDB_MODE=offline" in err
    assert not (tmp_path / "run").exists()


class Failing(Writer):
    """Fails where $FAILS says: at its opening, at the step 12, or when it closes."""

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self.fail("open")

    def fail(self, where: str) -> None:
        if os.environ["FAILS"] == where:
            raise ConnectionError("the network is gone")

    def write(self, points: Points) -> None:
        if points.step >= 12:
            self.fail("write")

    def close(self, *, is_done: bool) -> None:
        self.fail("close")


@WRITERS.register("failing")
def failing() -> type[Writer]:
    return Failing


@pytest.mark.parametrize(("where", "step"), [("write", 12), pytest.param("close", NUM_STEPS, marks=pytest.mark.slow)])
def test_a_writer_that_fails_in_a_run_is_warned_of_once_and_the_run_goes_on(
    where: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", where)
    run = trained(tmp_path / "run", "--log-to", "failing,tensorboard")
    [warning] = events(run, "warning")
    assert (warning["writer"], warning["step"]) == ("failing", step)
    assert warning["problem"] == "failing failed and gets no more events: ConnectionError: the network is gone"
    assert [at for at, _ in scalars(run)["train/loss"]] == [e["step"] for e in events(run, "step")]
    assert_same_bits(run, trained(tmp_path / "plain"))


def test_a_writer_that_cannot_begin_stops_a_new_run_and_not_one_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "open")
    assert gapfx("sparsify", TASK, "--out", tmp_path / "new", "--log-to", "failing", *SHORT) == 2
    assert "failing cannot be started: ConnectionError: the network is gone" in capsys.readouterr().err
    run = trained(tmp_path / "run")
    cut_back(run, 20)
    trained(run, "--resume", "--log-to", "failing")
    [warning] = events(run, "warning")
    assert (warning["writer"], warning["step"]) == ("failing", 20)


PLAN = Plan((Group("first", (Weight("a", (4, 4), 0.5), Weight("b", (2, 2), 0.5))), Group("last", ())), sparsity=0.5)


def test_a_group_is_as_sparse_as_its_weights_together_and_an_evaluation_after_its_prune_has_a_name_of_its_own() -> None:
    reader = Reader(PLAN)
    facts = {"a": {"numel": 16, "kept": 2}, "b": {"numel": 4, "kept": 3}}
    score: dict[str, Any] = {"event": "eval", "metrics": {"accuracy": 0.5}, "sparsity": 0.0}
    assert reader.read({**score, "step": 8}).scalars == {"eval/accuracy": 0.5}
    pruned = reader.read({"event": "prune", "step": 8, "weights": facts, "explored": 1.0})
    assert pruned.scalars == {"sparsity/group/first": 0.75, "explored": 1.0}
    assert reader.read({**score, "step": 8}).scalars == {"pruned/accuracy": 0.5}
    assert reader.read({**score, "step": 9}).scalars == {"eval/accuracy": 0.5}
    assert reader.read({"event": "audit", "step": 9, "sparsity": 0.5}) == Points(9)


def test_steps_a_second_are_told_where_nothing_else_takes_time() -> None:
    reader, speeds = Reader(PLAN), list[float | None]()
    line = {"event": "step", "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}
    between = {20: {"event": "eval", "step": 20, "metrics": {}, "sparsity": 0.5}}
    for step, seconds in ((10, 1.0), (20, 3.0), (30, 5.0), (40, 5.5)):
        points = reader.read({**line, "step": step, "seconds": seconds})
        speeds.append(points.scalars.get("speed/steps_per_second"))
        if step in between:
            reader.read(between[step])
    assert speeds == [None, 5.0, None, 20.0]
