"""The graph of the whole model after every pass, as `gapfx plan --emit-graph` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import gapfx

TASK = """
import torch
from torch import nn
from tests.models import LanguageModel

def model():
    return LanguageModel()

def example():
    return torch.arange(12).reshape(2, 6)
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return path


def test_the_file_shows_the_tree_and_every_pass(
    task: Path, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = task.with_name("graph.txt")
    assert gapfx("plan", task, "--emit-graph", file) == 0
    golden("emit_graph", file.read_text())
    shown = capsys.readouterr().out
    assert gapfx("plan", task) == 0
    assert capsys.readouterr().out == shown, "the plan is the same"


def test_masks_stand_inside_of_owners_and_the_text_is_the_same_in_every_run(task: Path) -> None:
    texts: list[str] = []
    for index in range(2):
        file = task.with_name(f"{index}.txt")
        assert gapfx("plan", task, "--emit-graph", file) == 0
        texts.append(file.read_text())
    assert texts[0] == texts[1]
    assert "0x" not in texts[0]
    before, _, after = texts[0].partition("# after insert-masks\n")
    assert "gapfx.mask" not in before
    sections = [section for section in after.split("\n[") if "gapfx.mask" in section]
    assert len(sections) == 4
    assert all(", owner, form forward]" in section for section in sections)


def test_only_a_graph_that_was_written_before_is_replaced(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = task.with_name("graph.txt")
    assert gapfx("plan", task, "--emit-graph", file) == 0
    assert gapfx("plan", task, "--emit-graph", file) == 0
    assert gapfx("plan", task, "--emit-graph", task) == 2
    assert "task.py exists and holds no graph of gapfx" in capsys.readouterr().err
    assert task.read_text() == TASK
    assert gapfx("plan", task, "--emit-graph", file.parent / "none" / "graph.txt") == 2
    assert "does not exist" in capsys.readouterr().err
