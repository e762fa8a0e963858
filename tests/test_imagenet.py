"""The task file for ImageNet: what it reads, how it trains, and the groups of its model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from gapfx.errors import TaskError
from tests.runs import ROOT, gapfx
from tests.task_files import load

COLOURS = {"green": (0, 255, 0), "red": (255, 0, 0), "blue": (0, 0, 255)}  # not in the order of their names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes, each image of one colour in the middle and white at its left and right ends."""
    for split, (name, colour) in itertools.product(("train", "val"), COLOURS.items()):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((64, 128, 3), 255, dtype=np.uint8)
            pixels[:, 32:96] = colour
            Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.JPEG", quality=95)
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("IMAGENET_SIDE", "32")
    return load("examples/imagenet.py")


def test_classes_are_the_folders_in_order_of_their_names(task: Any, folder: Path) -> None:
    val = task.data("val")
    assert [(path.parent.name, number) for path, number in val.files] == [
        *[("blue", 0)] * 2,
        *[("green", 1)] * 2,
        *[("red", 2)] * 2,
    ]
    assert task.model().fc.out_features == 3
    assert folder / "val" / "red" / "1.JPEG" == val.files[-1][0]


@pytest.mark.usefixtures("folder")
def test_validation_sees_the_middle_of_an_image_normalised(task: Any) -> None:
    image, label = task.data("val")[4]
    assert image.shape == (3, 32, 32)
    assert label == 2
    red = (torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1) - task.column(task.MEAN)) / task.column(task.STD)
    torch.testing.assert_close(image, red.expand(3, 32, 32), rtol=0, atol=0.1)


@pytest.mark.usefixtures("folder")
def test_training_images_depend_on_the_global_random_stream_alone(task: Any) -> None:
    train = task.data("train")
    torch.manual_seed(3)
    first, other = train.__getitems__([0, 3, 5]), train.__getitems__([0, 3, 5])
    torch.manual_seed(3)
    torch.testing.assert_close(train.__getitems__([0, 3, 5]), first, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert [int(label) for _, label in first] == [0, 1, 2]


def test_random_parts_lie_inside_and_have_the_areas_and_aspects_asked_for(task: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([task.random_box((400, 300), generator) for _ in range(500)])
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert boxes.min() >= 0
    assert bool((boxes[:, 2:] <= torch.tensor((400, 300))).all())
    shares = widths * heights / 400 / 300
    assert 0.075 < shares.min() < 0.15
    assert 0.85 < shares.max() <= 1
    assert 0.74 < (widths / heights).min() < (widths / heights).max() < 1.36


def test_the_middle_is_what_a_resize_to_256_and_a_crop_of_224_leave(task: Any) -> None:
    assert task.middle_box((512, 256)) == (144, 16, 368, 240)


def test_without_the_variable_one_line_names_it(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert gapfx("sparsify", ROOT / "examples" / "imagenet.py", "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: $IMAGENET_DIR is not set")
    assert len(said.splitlines()) == 1


def test_a_folder_without_classes_is_refused(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    with pytest.raises(TaskError, match="train has no folder of a class"):
        task.data("train")


def test_the_model_is_resnet_50_of_version_1_5(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with torch.device("meta"):
        model = task.model()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert model.layer2[0].conv1.stride == (1, 1)
    assert model.layer2[0].conv2.stride == (2, 2)


def test_norms_and_biases_do_not_decay(task: Any) -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 3, 1, 1), (4,), (7, 1), (1,))]
    decaying, still = task.optimizer(params).param_groups
    assert decaying["params"] == [params[0], params[2]]  # live values of a weight are a column
    assert still["params"] == [params[1], params[3]]
    assert (decaying["weight_decay"], still["weight_decay"], still["momentum"]) == (3.05e-5, 0, 0.875)


@pytest.mark.parametrize(("num_steps", "top"), [(200, 66), (30 * 1251, 8 * 1251), (150 * 1251, 8 * 1251)])
def test_the_learning_rate_rises_and_falls_once(task: Any, num_steps: int, top: int) -> None:
    rates = [task.lr(step, num_steps) for step in range(num_steps)]
    peak = max(range(num_steps), key=rates.__getitem__)
    assert peak == top
    assert rates[peak] == 1
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert task.lr(0, 1) > 0


def test_the_best_one_and_five_are_counted(task: Any) -> None:
    scores = torch.eye(8).repeat(2, 1) + torch.arange(8) / 100
    classes = torch.cat((torch.arange(8), torch.tensor([0, 0, 0, 7, 7, 1, 2, 3])))
    metrics = task.evaluate(lambda _: scores, [(torch.empty(16, 3, 1, 1), classes)])
    # Row i has the best score for class i, then for 7, 6, 5 and so on: in the second half rows 0, 3, 4 and 7 count.
    assert metrics == {"top1": 9 / 16, "top5": 12 / 16}


def test_mixing_is_between_the_losses_of_both_classes(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = torch.eye(4).view(4, 4, 1, 1), torch.arange(4)
    plain = task.loss(lambda x: x.flatten(1), (images, classes))
    torch.testing.assert_close(plain, F.cross_entropy(torch.eye(4), classes, label_smoothing=0.1))
    monkeypatch.setattr(task, "MIXUP", 0.2)
    torch.manual_seed(0)
    share = float(torch.distributions.Beta(0.2, 0.2).sample())
    mixed = share * torch.eye(4) + (1 - share) * torch.eye(4).flip(0)
    goal = share * F.one_hot(classes) + (1 - share) * F.one_hot(classes.flip(0))
    torch.manual_seed(0)
    found = task.loss(lambda x: x.flatten(1), (images, classes))
    torch.testing.assert_close(found, F.cross_entropy(mixed, goal.float(), label_smoothing=0.1))


def test_phases_are_those_of_the_paper(task: Any, folder: Path, capsys: Any) -> None:
    """30 epochs for each of four stages, seven times, then 150; the optimizer and its rate begin anew each time."""
    assert len(task.data("train")) == 6
    flags = ("--no-calibrate", "--json", "--batch-size", 2, "--micro-batch", 2)
    assert gapfx("plan", ROOT / "examples" / "imagenet.py", *flags) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert [phase["grow"] for phase in phases] == [[0], [1], [2], [3]] * 7 + [[]]
    assert [phase["stop"] - phase["start"] for phase in phases] == [30 * 3] * 28 + [150 * 3]
    assert {(phase["state"], phase["lr"]) for phase in phases} == {("reset", "restart")}


def test_the_groups_are_the_stages_with_conv1_in_the_first_and_fc_in_the_last(capsys: Any) -> None:
    arguments = ("--input", "2x3x32x32", "--no-calibrate", "--json")
    assert gapfx("plan", ROOT / "examples" / "imagenet.py", *arguments) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["name"] for group in groups] == ["layer1", "layer2", "layer3", "layer4"]
    fqns = [[weight["fqn"] for weight in group["weights"]] for group in groups]
    assert [len(names) for names in fqns] == [11, 13, 19, 11]
    for number, names in enumerate(fqns, 1):
        assert {name.split(".")[0] for name in names} - {"conv1", "fc"} == {f"layer{number}"}
    assert "conv1.weight" in fqns[0]
    assert "fc.weight" in fqns[-1]
