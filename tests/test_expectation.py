"""What a plan is said to gain: of measured seconds alone, and nothing is said to be small that was not looked at."""

from __future__ import annotations

import pytest

from gapfx.calibration import Case
from gapfx.expectation import NOT_KNOWN, NOTHING_TO_GAIN, why_nothing
from gapfx.passes.choose_kernels import Choice
from tests.kernels.needs import needs_kernels
from tests.runs import ROOT, gapfx

LARGE, SMALL = Case((768, 768), (512,), 0.8), Case((8, 8), (4,), 0.8)


@pytest.mark.parametrize(
    ("case", "reason", "text"),
    [(LARGE, "", NOT_KNOWN), (LARGE, "no kernel", NOTHING_TO_GAIN), (SMALL, "", NOTHING_TO_GAIN)],
)
def test_a_large_layer_without_figures_is_not_called_too_small(case: Case, reason: str, text: str) -> None:
    assert why_nothing({"weight": Choice("expand", (case,), reason=reason)}) == text


@needs_kernels
def test_stored_figures_are_not_compared_with_measured_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(*given: object) -> float:
        pytest.fail("a step was timed")

    monkeypatch.setattr("gapfx.sparse.step_seconds", timed)
    monkeypatch.setattr("gapfx.calibration.table.native.level", lambda: "avx512")
    assert gapfx("plan", ROOT / "examples" / "fashion.py", "--no-calibrate") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected of")]
    assert line.startswith("expected of the planned layers, forward and backward, from stored figures: ")
    assert "of the dense step" not in line
