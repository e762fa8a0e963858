"""The page of results: made from records alone, and the committed one is what the records give."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapfx.compare.records import RECORDS, Record, Records
from tests.runs import ROOT
from tools.make_results import results

STUDIES = ROOT / "examples" / "studies"
STUDY = """# gapfx compare studies/small.toml --out studies/small
# Two methods
# on a small task.
task = "task.py"
metric = "accuracy"
methods = ["dense", "gap"]
subject = "gap"
sparsities = [0.8]
seeds = [0, 1]
budgets = ["epochs"]

[tune]
lr_scale = [1, 2]
sparsity = 0.8
seed = 9
"""


def record(name: str, value: float) -> Record:
    return Record(name, {}, {"accuracy": value}, {}, 1e9, 1e3, 1800, 2, 0.8, {"torch": "2.13.0"})


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(STUDY)
    (tmp_path / "none.toml").write_text(STUDY)
    records = Records.read(tmp_path / "small")
    values = {"dense-0-0-epochs": 0.9, "dense-0-1-epochs": 0.8, "gap-0.8-0-epochs": 0.7, "gap-0.8-1-epochs": 0.8}
    values |= {"dense-0-9-lr1": 0.5, "dense-0-9-lr2": 0.6, "gap-0.8-9-lr1": 0.6, "gap-0.8-9-lr2": 0.5}
    for name, value in values.items():
        records.add(record(name, value))
    return tmp_path


def test_a_section_has_the_command_the_words_the_tables_and_the_versions(studies: Path) -> None:
    page = results(studies)
    assert "## small\n\n`gapfx compare studies/small.toml --out studies/small`\n\nTwo methods on a small task." in page
    assert "which counts for nothing else: dense 2, gap 1. At an end of what was tried: dense, gap. The" in page
    assert "| gap | 0.8 | 0.7500 |" in page
    assert "8 runs with torch 2.13.0; 4.0 hours of training in all." in page


def test_a_study_without_records_is_left_out(studies: Path) -> None:
    assert "## none" not in results(studies)


def test_the_committed_page_is_what_the_committed_records_give() -> None:
    page = ROOT / "RESULTS.md"
    assert page.read_text() == results(STUDIES)
    assert len(list(STUDIES.glob(f"*/{RECORDS}"))) == page.read_text().count("\n## ")
