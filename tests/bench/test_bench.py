"""`gapfx bench`: what it says of made-up timings, and that it times a task and a run without leaving a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gapfx.bench.clock import OUT_OF_TIME, Stopwatch
from gapfx.bench.command import STOPPED
from gapfx.bench.findings import Findings, Timing, What
from gapfx.bench.layers import LAYER
from gapfx.bench.models import Bench, modules_of
from gapfx.bench.verdict import MODEL, format_findings, verdicts
from gapfx.calibration import Case, Times
from gapfx.commands import Source
from gapfx.training import make_feed
from tests.kernels.needs import needs_kernels
from tests.runs import TASK, gapfx


def findings(what: What = "step", **seconds: float) -> Findings:
    timings = [Timing(MODEL, what, way.replace("_", " "), 1, 512, taken) for way, taken in seconds.items()]
    return Findings("a processor", "fp32", 0.8, "unstructured", 4, tuple(timings))


def test_the_verdict_names_the_gain_with_and_without_a_dense_group() -> None:
    found = findings(dense=1.0, sparse=0.5, expand=1.1)
    grown = Timing(MODEL, "step", "sparse, a group dense", 1, 512, 0.8)
    [line] = verdicts(Findings("cpu", "fp32", 0.8, "unstructured", 4, (*found.timings, grown)))
    assert (
        line == "a training step at 512 positions on 1 thread: 2.00x of dense torch (sparse), 1.25x with a group dense"
    )


def test_the_verdict_says_when_sparsity_does_not_pay_and_what_would() -> None:
    [line] = verdicts(findings("forward", dense=1.0, expand=1.1, sparse=1.0, sparse_4x1=0.5))
    assert "inference at 512 positions" in line
    assert "1.00x of dense torch: this sparsity will not speed the model up here; blocks of 4x1 would: 2.00x" in line


def test_the_verdict_says_when_another_dense_way_is_faster() -> None:
    [line] = verdicts(findings("forward", dense=1.0, sparse=0.9, dense_ONNX_Runtime=0.5))
    assert line.endswith("dense with ONNX Runtime is faster: 2.00x")


def test_what_could_not_be_timed_is_told_once_with_its_reason() -> None:
    missing = [Timing(MODEL, "step", "sparse", 1, 512, reason="no kernel") for _ in range(2)]
    text = format_findings(Findings("cpu", "fp32", 0.8, "unstructured", 4, tuple(missing)))
    assert text.count("sparse: no kernel") == 1


def test_numbers_as_json_have_gains() -> None:
    timings = json.loads(findings(dense=1.0, sparse=0.5).to_json())["timings"]
    assert [timing["gain"] for timing in timings] == [1.0, 2.0]


def test_a_way_that_fails_is_told_and_the_others_are_timed() -> None:
    def fails() -> None:
        raise ValueError("not today")

    watch = Stopwatch(60)
    watch.time("a layer", "step", 8, {"dense": lambda: None, "sparse": fails}, 0.01)
    assert {t.way: (t.seconds > 0, t.reason) for t in watch.timings} == {
        "dense": (True, ""),
        "sparse": (False, "ValueError: not today"),
    }


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "backend='inductor' raised:\nNo compiler found\nand more",
            "RuntimeError: backend='inductor' raised: No compiler found",
        ),
        ("shapes differ\nat line 3", "RuntimeError: shapes differ"),
    ],
)
def test_a_reason_is_one_line_that_says_what_it_was(message: str, reason: str) -> None:
    def fails() -> None:
        raise RuntimeError(message)

    watch = Stopwatch(60)
    watch.time("a layer", "step", 8, {"compiled": fails}, 0.01)
    assert watch.timings[0].reason == reason


def test_nothing_is_timed_when_the_time_is_up() -> None:
    watch = Stopwatch(0)
    watch.time("a layer", "step", 8, {"dense": lambda: pytest.fail("it ran")}, 1)
    assert "no time was left" in watch.timings[0].reason


@pytest.mark.filterwarnings("ignore")
def test_a_task_is_timed_without_a_compilation_that_the_time_may_not_do_for_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gapfx("bench", TASK, "--seconds", 10, "--json") == 0
    of_model = [t for t in json.loads(capsys.readouterr().out)["timings"] if t["subject"] == MODEL]
    timed = {(timing["what"], timing["way"]) for timing in of_model if timing["seconds"]}
    forwards = {"dense", "expand", "sparse"}
    assert {("forward", way) for way in forwards} | {("step", way) for way in forwards} <= timed
    assert ("step", "sparse, a group dense") in timed
    assert {t["reason"] for t in of_model if t["way"] == "dense torch.compile"} == {OUT_OF_TIME}
    assert list(tmp_path.iterdir()) == []
    assert gapfx("bench", TASK, "--threads", "none") == 2
    assert "cannot read the threads" in capsys.readouterr().err
    assert gapfx("bench", TASK, "--threads", "1,99999999999") == 2
    assert "99999999999 threads are more than this machine has" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", [("plan",), ("bench", "--seconds", 1, "--no-compile")])
def test_what_a_task_prints_is_not_in_the_json(
    command: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "talks.py"
    task.write_text(TASK.read_text() + '\nprint("loading the data")\n')
    name, *flags = command
    assert gapfx(name, task, "--json", *flags) == 0
    shown = capsys.readouterr()
    assert isinstance(json.loads(shown.out), dict)
    assert "loading the data" in shown.err


@pytest.mark.filterwarnings("ignore")
def test_training_steps_of_a_model_with_a_script_module_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    task = TASK.parent / "scripted_training.py"
    assert gapfx("bench", task, "--seconds", 10, "--no-compile", "--json") == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    steps = {timing["way"] for timing in timings if (timing["subject"], timing["what"]) == (MODEL, "step")}
    assert {"dense", "expand", "expand, a group dense", "sparse, a group dense"} <= steps


@needs_kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layer_seconds", "is_measured"), [(0.1, True), (50.0, False)])
def test_kernels_are_measured_where_a_layer_fits_into_their_share_of_the_time(
    layer_seconds: float, is_measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Case] = []

    def measure(case: Case) -> Times:
        measured.append(case)
        return Times(3, 2, 1)

    monkeypatch.setenv("GAPFX_CACHE", str(tmp_path))
    monkeypatch.setattr("gapfx.calibration.table.SMALLEST_WORK", 1)
    monkeypatch.setattr("gapfx.calibration.table.measure", measure)
    task, settings = Source(str(TASK), "", {"kernels": "auto"}).load()
    bench = Bench(task, settings, make_feed(task, settings, 0, 1), None, torch.device("cpu"), with_compile=False)
    watch = Stopwatch(100, longest={LAYER: layer_seconds})
    assert "sparse" in modules_of(bench, watch)
    assert bool(measured) == is_measured
    assert any("were not measured within 0 s" in note for note in watch.notes) != is_measured


@pytest.mark.filterwarnings("ignore")
def test_what_was_timed_before_ctrl_c_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gapfx.bench.command.time_model", stop)
    assert gapfx("bench", TASK, "--seconds", 5) == 130
    assert STOPPED in capsys.readouterr().out


def test_a_gain_is_over_the_dense_model_at_the_same_batch() -> None:
    def at(batch: int, way: str, seconds: float) -> Timing:
        return Timing(MODEL, "forward", way, 1, 1, seconds, batch=batch)

    timings = (at(1, "dense", 1.0), at(8, "dense", 6.0), at(8, "sparse fp32", 3.0))
    found = Findings("cpu", "fp32", 0.8, "unstructured", 4, timings)
    assert [found.gain(timing) for timing in timings] == [1.0, 1.0, 2.0]
