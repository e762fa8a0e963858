"""The tool that prints the groups of well-known architectures."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tools.show_groups import SIGHTS, app, show

GROUPS = Path(__file__).parents[1] / "GROUPS.md"


def test_the_layers_of_a_recurrent_network_are_its_groups() -> None:
    text = show("lstm")
    assert "98,304    4 weights  layer 3" in text
    assert "blocks split 0 of 4" in text
    assert SIGHTS["lstm"].judgement in text


def test_an_unknown_model_is_named_with_those_that_are_known() -> None:
    found = CliRunner().invoke(app, ["lstn"])
    assert found.exit_code == 2
    assert "no model 'lstn'; known: resnet50, " in found.output


def test_the_committed_file_has_every_model_and_its_judgement() -> None:
    text = GROUPS.read_text()
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(SIGHTS)
    assert all(sight.judgement in text for sight in SIGHTS.values())
