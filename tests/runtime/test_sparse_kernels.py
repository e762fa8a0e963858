"""Training with kernels that skip zeros: the masks of the dense products, repeatable, on any ranks and stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gapfx.calibration import Case, Times
from gapfx.plan import Plan
from tests.kernels.needs import needs_kernels
from tests.runs import TASK, assert_same_bits, events, gapfx, weights

pytestmark = needs_kernels
RUN = ("--rounds", 1, "--phase-epochs", 0.25, "--finetune-epochs", 0.25, "--groups", 3)
SPARSE, EXPAND = ("--kernels", "sparse", "--no-calibrate"), ("--kernels", "expand")
# Sums in another order; a step of AdamW makes of a rounded gradient near zero at most a step of its learning rate.
RELATIVE, ABSOLUTE = 1e-3, 1e-4


def trained(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *RUN, *flags) == 0
    return out


def assert_close(run: Path, other: Path) -> None:
    """The same masks, and weights that differ by rounding."""
    ours, theirs = weights(run), weights(other)
    for fqn, weight in ours.items():
        assert torch.equal(weight == 0, theirs[fqn] == 0), fqn
        torch.testing.assert_close(weight, theirs[fqn], rtol=RELATIVE, atol=ABSOLUTE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "sparse", *SPARSE)


def test_the_plan_of_the_run_holds_the_kernels(sparse: Path) -> None:
    plan = json.loads((sparse / "plan.json").read_text())
    assert {weight["kernel"] for group in plan["groups"] for weight in group["weights"]} == {"sparse"}


def test_a_run_ends_as_with_dense_products_up_to_rounding(sparse: Path, tmp_path: Path) -> None:
    assert_close(sparse, trained(tmp_path / "expand", *EXPAND))


def test_a_run_repeats_to_the_bit(sparse: Path, tmp_path: Path) -> None:
    assert_same_bits(sparse, trained(tmp_path / "again", *SPARSE))


def test_steps_tell_what_preparation_took(sparse: Path) -> None:
    assert any(event.get("preparation_seconds", 0) > 0 for event in events(sparse, "step"))


def test_a_resumed_run_follows_its_plan_without_measuring(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object) -> None:
        pytest.fail("a kernel was measured")

    monkeypatch.setattr("gapfx.calibration.table.SMALLEST_WORK", 1)
    monkeypatch.setattr("gapfx.calibration.table.measure", measured)
    run = trained(tmp_path / "run", *SPARSE)
    kept = sorted((run / "checkpoints").glob("*"))
    shutil.rmtree(kept[-1])
    assert gapfx("sparsify", TASK, "--out", run, *RUN, "--kernels", "sparse", "--resume") == 0
    assert_same_bits(run, sparse)


def test_notes_of_the_compiler_are_shown_when_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAPFX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("gapfx.calibration.table.SMALLEST_WORK", 1)
    trained(tmp_path / "run")
    assert "cannot be written (FileExistsError): kernels will be measured again" in capsys.readouterr().out


def test_a_resumed_run_cannot_change_its_kernels(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("sparsify", TASK, "--out", sparse, *RUN, *EXPAND, "--resume") == 2
    assert "started with kernels 'sparse'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_trains_and_keeps_what_is_pruned_at_zero(tmp_path: Path, stage: int) -> None:
    run = trained(tmp_path / "run", *SPARSE, "--dtype", "bf16", "--zero", stage)
    assert json.loads((run / "summary.json").read_text())["sparsity_actual"] == pytest.approx(0.8, abs=0.01)
    assert all(weight.isfinite().all() for weight in weights(run).values())


def test_blocks_that_the_measurement_chose_are_those_of_the_run_and_of_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(case: Case) -> Times:
        return Times(4.0, 4.0, 1.0 if case.pattern == "block:4x1" else 3.0)

    with monkeypatch.context() as patch:
        patch.setenv("GAPFX_CACHE", str(tmp_path / "cache"))
        patch.setattr("gapfx.calibration.table.SMALLEST_WORK", 1)
        patch.setattr("gapfx.calibration.table.measure", measure)
        run = trained(tmp_path / "run", "--pattern", "auto")
    patterns = {weight.fqn: weight.pattern for weight in Plan.load(run / "plan.json").weights()}
    assert set(patterns.values()) == {"block:4x1"}
    ended = weights(run)
    for fqn in patterns:
        kept = ended[fqn].ne(0).unflatten(0, (-1, 4))
        assert torch.equal(kept.any(1), kept.all(1)), fqn
    shutil.rmtree(max((run / "checkpoints").glob("*")))
    (run / "summary.json").unlink()
    assert gapfx("sparsify", TASK, "--out", run, *RUN, "--pattern", "auto", "--resume") == 0
    assert weights(run).keys() == ended.keys()
    assert all(torch.equal(value, ended[fqn]) for fqn, value in weights(run).items())
