"""The SVG of a plan: what it says, that it is well-formed, and the file that `gapfx plan --figure` writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from gapfx.figure import MARKER
from gapfx.figure.labels import LABEL_SIZE, NAME_SIZE, SHAPE_SIZE, width_of
from gapfx.figure.legend import entries
from gapfx.figure.palette import DARK, GREY, HUES, LIGHT, NUM_LOOKS, TINT, contrast, group_class, is_striped, mix
from gapfx.figure.scene import Scene
from gapfx.figure.svg import draw
from gapfx.plan import Group, Plan, Weight
from tests.figures import MODELS, SVG, boxes, chips, scene, scene_of
from tests.models import LanguageModel, mlp, tokens
from tests.runs import gapfx

TASK = """
import torch
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


def test_the_figure_of_a_small_model_is_this_text(golden: Callable[[str, str], None]) -> None:
    golden("figure", draw(scene_of(LanguageModel(), tokens())).replace("><", ">\n<"))


@pytest.mark.parametrize("name", MODELS)
def test_every_planned_weight_is_drawn_once_with_its_group(name: str) -> None:
    shown = scene(name)
    planned = {weight.fqn: group_class(index) for index, g in enumerate(shown.plan.groups) for weight in g.weights}
    drawn = [chip for chip in chips(draw(shown)) if "used again in" not in chip.title]
    fqns = Counter(chip.title.split("\n")[0] for chip in drawn)
    assert set(fqns.values()) == {1}
    assert planned.keys() <= fqns.keys()
    assert {chip.title.split("\n")[0]: chip.look for chip in drawn if chip.look != "d"} == planned


@pytest.mark.parametrize("name", MODELS)
def test_text_fits_into_the_weights(name: str) -> None:
    sizes = {"n": NAME_SIZE, "s": SHAPE_SIZE}
    for chip in chips(draw(scene(name))):
        texts = [(x, text, sizes[look]) for look, x, text in chip.texts if look in sizes]
        assert len(texts) == 2
        assert all(text and x + width_of(text, size) <= chip.width for x, text, size in texts), chip


def test_names_of_boxes_end_before_the_weights() -> None:
    inner = nn.Sequential(*(mlp() for _ in range(3)))
    model = nn.ModuleDict({"a_rather_long_name": nn.ModuleDict({"of_another_model": nn.ModuleDict({"layers": inner})})})
    svg = draw(scene_of(_Calls(model, inner), torch.randn(4, 6)))
    first = min(chip.x for chip in chips(svg))
    names = [(x, text) for box in boxes(svg) for _, x, text in box.texts if text]
    assert len({text for _, text in names}) > 3
    assert all(x + width_of(text, LABEL_SIZE) < first for x, text in names)


class _Calls(nn.Module):
    def __init__(self, model: nn.Module, inner: nn.Sequential) -> None:
        super().__init__()
        self.model, self.inner = model, (inner,)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block(x) for block in self.inner[0]]


def test_hovering_over_a_weight_tells_everything_about_it() -> None:
    titles = {chip.title.split("\n")[0]: chip.title for chip in chips(draw(scene_of(mlp(), torch.randn(4, 6))))}
    assert titles["0.weight"] == "0.weight\n[8, 6] linear\ngroup 1 of 3: 0\nsparsity 90.0 %, pattern unstructured"
    titles = {chip.title.split("\n")[0]: chip.title for chip in chips(draw(scene("language-model")))}
    assert "\ndense: " in titles["tokens.weight"]


def test_a_tied_weight_stands_again_at_the_module_that_uses_it_too() -> None:
    drawn = [chip for chip in chips(draw(scene("language-model"))) if "tokens.weight" in chip.title]
    assert [[text for _, _, text in chip.texts] for chip in drawn] == [
        ["tokens", "13\u00d78 embedding"],
        ["head", "= tokens"],
    ]


def test_a_module_that_runs_again_is_drawn_once_with_the_number_of_its_uses() -> None:
    texts = [text for chip in chips(draw(scene("repeated"))) for _, _, text in chip.texts]
    assert "16\u00d78 linear (4 uses)" in texts


def test_odd_names_give_a_well_formed_file() -> None:
    names = ["<b>&amp;", "\"'", "wei\u00df \u5c42\U0001f600", "bell\x07\ufffe\ud800", "]]>--", "lambda"]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    svg = draw(scene_of(model, torch.randn(2, 4)))
    svg.encode()
    titles = [chip.title.split("\n")[0] for chip in chips(svg)]
    assert titles[:3] == [f"{name}.weight" for name in names[:3]]
    assert titles[3] == "bell\ufffd\ufffd\ufffd.weight"
    assert len(titles) == len(names)


def test_the_legend_counts_every_weight_and_element() -> None:
    shown = scene("resnet-50")
    found = [entry for entry in entries(shown) if entry.group is not None]
    counts = [int(entry.words.split(" weight")[0]) for entry in found]
    shares = [float(re.findall(r"([\d.]+) %", entry.words)[0]) for entry in found]
    assert counts == [len(group.weights) for group in shown.plan.groups]
    assert sum(counts) == len(list(shown.plan.weights()))
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert [entry.name for entry in found] == [group.name for group in shown.plan.groups]


def test_notes_stand_below_the_title() -> None:
    shown = scene_of(mlp(), torch.randn(4, 6))
    noted = Scene(shown.model, shown.plan, ("balance 1.2 & more",))
    heights = [float(ElementTree.fromstring(draw(one)).get("height", "")) for one in (shown, noted)]
    assert ">balance 1.2 &amp; more</text>" in draw(noted)
    assert heights[1] == heights[0] + 17


def test_weights_that_stay_dense_are_grey_and_counted() -> None:
    shown = scene("language-model")
    assert entries(shown)[-1].words == "1 weight, 104 elements"
    assert {chip.title.split("\n")[0] for chip in chips(draw(shown)) if chip.look == "d"} == {"tokens.weight"}


def test_a_planned_weight_that_no_layer_takes_is_drawn_apart() -> None:
    shown = scene_of(mlp(), torch.randn(4, 6))
    other = Weight("elsewhere.weight", (2, 3), 0.5)
    plan = Plan((*shown.plan.groups, Group("more", (other,))))
    svg = draw(Scene(shown.model, plan))
    assert "not in the graph" in svg
    assert [chip.look for chip in chips(svg) if chip.title.startswith("elsewhere")] == ["g3"]


def test_the_same_model_gives_the_same_bytes() -> None:
    assert draw(scene("many-experts")) == draw(scene("many-experts"))


@pytest.mark.parametrize("name", ["resnet-50", "encoder-decoder"])
def test_the_file_needs_nothing_else(name: str) -> None:
    svg = draw(scene(name))
    assert svg.startswith(MARKER)
    assert re.findall(r"<script|href|url\(|@import|@font-face", svg) == []
    assert set(re.findall(r"https?://[^\"]*", svg)) == {"http://www.w3.org/2000/svg"}
    assert "@media(prefers-color-scheme:dark)" in svg


def test_looks_of_sixteen_groups_differ() -> None:
    looks = [(HUES[index % len(HUES)], is_striped(index)) for index in range(16)]
    assert len(set(looks)) == NUM_LOOKS == 16
    assert len({group_class(index) for index in range(16)}) == 16
    assert group_class(16) == group_class(0)
    assert GREY not in HUES


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme: dict[str, str]) -> None:
    for hue in (*HUES, GREY):
        ground = mix(hue, theme["paper"], TINT[theme["paper"]])
        assert contrast(theme["ink"], ground) >= 7
        assert contrast(theme["soft"], ground) >= 4.5
        assert max(contrast("#ffffff", hue), contrast("#101416", hue)) >= 4.5
    assert contrast(theme["line"], theme["paper"]) >= 3


def test_every_group_of_many_has_a_number_and_stripes_after_the_eighth() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    drawn = chips(draw(scene_of(model, torch.randn(2, 4), groups=20, strategy="params")))
    assert [chip.texts[0][2] for chip in drawn] == [str(number) for number in range(1, 21)]
    assert [chip.look for chip in drawn] == [f"g{index % 16}" for index in range(20)]


def test_the_command_writes_the_figure_and_shows_the_same_plan(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, graph = task.with_name("plan.svg"), task.with_name("graph.txt")
    assert gapfx("plan", task, "--figure", file, "--emit-graph", graph) == 0
    shown = capsys.readouterr().out
    assert gapfx("plan", task) == 0
    assert capsys.readouterr().out == shown
    root = ElementTree.fromstring(file.read_text())
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "LanguageModel \u00b7 gapfx"
    assert graph.read_text().startswith("# captured")


def test_the_figure_of_a_plan_from_a_file_has_its_groups(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("plan", task, "--json", "--groups", "2") == 0
    plan, file = task.with_name("plan.json"), task.with_name("plan.svg")
    plan.write_text(capsys.readouterr().out.replace('"blocks.1"', '"my own"'))
    assert gapfx("plan", task, "--plan", plan, "--figure", file) == 0
    assert "group 2 of 2: my own" in file.read_text()


def test_only_a_figure_that_was_written_before_is_replaced(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = task.with_name("plan.svg")
    assert gapfx("plan", task, "--figure", file) == 0
    assert gapfx("plan", task, "--figure", file) == 0
    capsys.readouterr()
    other = task.with_name("drawing.svg")
    other.write_text('<?xml version="1.0" encoding="UTF-8"?>\n<svg/>')
    for path in (task, other, task.parent):
        assert gapfx("plan", task, "--figure", path) == 2
        assert f"error: {path} exists and holds no figure of gapfx" in capsys.readouterr().err
    assert task.read_text() == TASK
    assert gapfx("plan", task, "--figure", task.parent / "none" / "plan.svg") == 2
    assert "the folder" in capsys.readouterr().err
