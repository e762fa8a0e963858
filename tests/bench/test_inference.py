"""`gapfx bench RUN`: the loaded model beside dense ones, and the sentence that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gapfx.bench.clock import OUT_OF_TIME, Stopwatch
from gapfx.bench.deployed import deploy
from gapfx.bench.findings import Findings, Timing
from gapfx.bench.forwards import at_batch, batch_of, in_bf16, inputs_of, session_or_reason
from gapfx.bench.inference import ModelTimer
from gapfx.bench.run_verdict import run_verdicts
from gapfx.bench.verdict import MODEL, format_findings
from gapfx.errors import UserError
from tests.kernels.needs import needs_kernels
from tests.runs import TASK, gapfx

LINEARS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training of the task that classifies."""
    out = tmp_path_factory.mktemp("bench") / "run"
    short = ("--rounds", 1, "--phase-epochs", 0.1, "--finetune-epochs", 0.1, "--kernels", "expand")
    assert gapfx("sparsify", TASK, "--out", out, *short) == 0
    return out


def findings(**batches: dict[str, float]) -> Findings:
    """Made-up seconds: batch_8={"dense": 1.0}."""
    rows = [
        Timing(MODEL, "forward", way, 1, int(name[6:]), taken, batch=int(name[6:]), kernel="mask 8")
        for name, ways in batches.items()
        for way, taken in ways.items()
    ]
    return Findings("a processor", "fp32", 0.9, "unstructured", 4, tuple(rows))


def test_the_sentence_names_the_gain_at_each_batch_and_in_what_form() -> None:
    found = findings(
        batch_1={"dense": 3.1, "sparse fp32": 1.3, "sparse int8": 1.0}, batch_64={"dense": 1.0, "sparse fp32": 0.8}
    )
    assert run_verdicts(found) == [
        "inference on 1 thread: faster than torch fp32 here: "
        "3.1x at batch 1 (int8 values, in fp32 2.4x), 1.2x at batch 64 (fp32 values)"
    ]


def test_the_sentence_is_honest_where_there_is_no_gain_or_a_dense_way_is_faster() -> None:
    found = findings(
        batch_1={"dense": 2.0, "sparse fp32": 1.0},
        batch_8={"dense": 1.0, "sparse fp32": 1.0, "dense ONNX Runtime": 0.5, "dense bf16": 0.8},
    )
    [line] = run_verdicts(found)
    assert "; not faster than torch fp32 here: 1.0x at batch 8; " in line
    assert line.endswith("a dense way is faster still: ONNX Runtime 2.0x at batch 8")
    text = format_findings(found)
    assert line in text
    assert "the model at batch 8" in text
    assert text.splitlines()[2].endswith("kernel")


def test_a_batch_without_a_timed_sparse_way_is_left_out() -> None:
    assert run_verdicts(findings(batch_1={"dense": 1.0, "dense bf16": 0.5})) == []


def test_inputs_are_cut_and_repeated_in_the_dimension_of_the_batch() -> None:
    given = ((torch.arange(6).view(3, 2), torch.ones(5, 3)), {"more": {"x": torch.arange(3.0)}, "flag": True})
    assert batch_of(given) == 3
    (x, other), more = at_batch(given, 5)
    assert x[:, 0].tolist() == [0, 2, 4, 0, 2]
    assert other.shape == (5, 3)
    assert more["more"]["x"].tolist() == [0, 1, 2, 0, 1]
    assert at_batch(given, 1)[0][0].tolist() == [[0, 1]]
    assert in_bf16(given)[1]["more"]["x"].dtype == torch.bfloat16
    assert in_bf16(given)[0][0].dtype == torch.int64


def test_a_loss_that_does_not_call_the_model_is_told() -> None:
    with pytest.raises(UserError, match="does not call the model"):
        inputs_of(nn.Linear(2, 2), lambda model: None)


def test_what_onnx_cannot_take_is_told() -> None:
    linear = nn.Linear(2, 2)
    pytest.importorskip("onnxruntime", reason="the comparison is with ONNX Runtime")
    assert session_or_reason(linear, ((), {"input": torch.ones(1, 2)})) == "it takes more than tensors"
    reason = session_or_reason(linear, ((torch.ones(1, 3),), {}))
    assert isinstance(reason, str)
    assert reason.startswith("the export failed: ")


@needs_kernels
def test_the_whole_model_is_timed_at_each_batch_and_rows_name_the_kernels(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert gapfx("bench", run, "--seconds", 20, "--no-compile", "--json") == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    of_model = [timing for timing in timings if timing["subject"] == MODEL]
    timed = {(timing["batch"], timing["way"]): timing for timing in of_model if timing["seconds"]}
    for batch in (1, 8, 32, 64):
        assert {"dense", "dense bf16", "sparse fp32", "sparse bf16"} <= {way for size, way in timed if size == batch}
        assert timed[batch, "dense"]["gain"] == 1.0
    assert timed[64, "sparse fp32"]["kernel"] == f"panels {LINEARS}"
    assert (1, "sparse int8") in timed
    refused = [timing for timing in of_model if (timing["batch"], timing["way"]) == (64, "sparse int8")]
    assert [timing["reason"] for timing in refused] == ["int8 values are for up to 15 tokens"]
    layers: list[dict[str, Any]] = [timing for timing in timings if timing["subject"].startswith("linear 16x32")]
    assert {timing["positions"] for timing in layers} == {1, 8, 64, 512}
    kernels = {timing["kernel"] for timing in layers if timing["way"].startswith("sparse")}
    assert kernels <= {"mask", "columns", "panels"}
    assert "panels" in kernels


def test_batches_that_would_take_too_long_are_told(run: Path) -> None:
    watch = Stopwatch(0.0)
    timer = ModelTimer(deploy(run, Stopwatch(60)), watch)
    timer.time(1.0)
    timer.time_compiled(1.0)
    assert {timing.reason for timing in watch.timings} == {OUT_OF_TIME}
    assert {timing.batch for timing in watch.timings} == {1, 8, 32, 64}
    assert "dense torch.compile" in {timing.way for timing in watch.timings}


@needs_kernels
def test_a_run_is_not_loaded_in_further_forms_when_the_time_is_up(run: Path) -> None:
    watch = Stopwatch(0.0)
    deployed = deploy(run, watch)
    assert list(deployed.loaded) == ["fp32"]
    timer = ModelTimer(deployed, watch)
    watch.seconds = 60.0
    timer.time(0.1)
    assert {timing.reason for timing in watch.timings if timing.way == "sparse bf16"} == {OUT_OF_TIME}


def test_settings_of_a_task_are_refused_for_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("bench", run, "--sparsity", 0) == 2
    assert "--sparsity is for tasks: a run has its own settings" in capsys.readouterr().err


def test_no_finished_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("bench", tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_a_script_module_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert gapfx("sparsify", TASK.parent / "scripted_training.py", "--out", run) == 0
    capsys.readouterr()
    assert gapfx("bench", run, "--seconds", 3, "--no-compile", "--json") == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert any(timing["way"] == "sparse fp32" and timing["seconds"] for timing in timings)
