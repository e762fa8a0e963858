"""Every example at smoke size, as a user would run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.made_up_pairs import write_pairs
from tests.runs import ROOT, gapfx, summary

SMOKE = {
    "fashion": ("--phase-epochs", 0.02, "--finetune-epochs", 0.02, "--rounds", 1),
    "text": ("--phase-epochs", 0.01, "--finetune-epochs", 0.01, "--rounds", 1),
    "translation": ("--phase-epochs", 0.5, "--finetune-epochs", 0.5, "--rounds", 1),
}


@pytest.fixture(autouse=True)
def _pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("TRANSLATION_DIR", str(write_pairs(tmp_path / "pairs")))  # none come with the repository


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_trains_and_ends_at_its_sparsity(path: Path, tmp_path: Path) -> None:
    assert gapfx("sparsify", path, "--out", tmp_path / "run", *SMOKE[path.stem]) == 0
    facts = summary(tmp_path / "run")
    assert facts["sparsity_actual"] == pytest.approx(facts["sparsity_target"], abs=1e-3)
    for weight in facts["per_weight"].values():
        assert abs(weight["numel"] * (1 - facts["sparsity_target"]) - weight["kept"]) <= 1
    assert facts["metrics"]["final"]
