"""The task file for detection: boxes, what it reads, and its metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from gapfx.errors import TaskError
from tests.task_files import ROOT, load

SUBSET = ROOT / "examples" / "data" / "detection"


@pytest.fixture(autouse=True)
def _subset_only(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("COCO_DIR", str(SUBSET))
    monkeypatch.setenv("DETECTION_SIDE", "128")


@pytest.fixture(scope="module")
def task() -> Any:
    return load("examples/detection.py")


@pytest.fixture(scope="module")
def ssd() -> Any:
    return load("examples/ssd/boxes.py")


def random_boxes(count: int, seed: int = 0) -> Tensor:
    points = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return points.flatten(1) + torch.tensor((0, 0, 0.01, 0.01))


def scene(task: Any, rows: list[tuple[float, ...]], size: tuple[int, int] = (128, 128)) -> Any:
    return task.make_scene(rows, {"width": size[0], "height": size[1]})


def test_default_boxes_are_those_of_the_paper_and_lie_around_their_cells(ssd: Any) -> None:
    boxes = ssd.default_boxes(300)
    assert boxes.shape == (8732, 4)
    torch.testing.assert_close(boxes[:4] * 300, torch.tensor([[4, 4, s, t] for s, t in shapes_of_the_first_cell()]))
    torch.testing.assert_close(boxes[4, :2] * 300, torch.tensor((12.0, 4.0)))  # the next cell is to the right
    with pytest.raises(ValueError, match="no default boxes for images of 200 pixels"):
        ssd.default_boxes(200)


def shapes_of_the_first_cell() -> list[tuple[float, float]]:
    mean, long, short = (21 * 45) ** 0.5, 21 * 2**0.5, 21 / 2**0.5
    return [(21, 21), (mean, mean), (long, short), (short, long)]


def test_decoding_is_the_inverse_of_encoding(ssd: Any) -> None:
    near = ssd.default_boxes(128)
    boxes = random_boxes(len(near))
    torch.testing.assert_close(ssd.decode(ssd.encode(boxes, near), near), boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(ssd.encode(ssd.corners(near), near), torch.zeros_like(near), rtol=0, atol=1e-4)


def test_overlaps_of_known_boxes(ssd: Any) -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0]])
    torch.testing.assert_close(ssd.iou(a, b), torch.tensor([[1 / 7, 1], [0, 0]]))


def test_a_default_box_takes_what_it_overlaps_and_every_object_gets_its_best_one(ssd: Any) -> None:
    near = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.22, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.1, 0.1, 0.1]])
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.75, 0.75, 0.9, 0.9]])  # the second overlaps box 2 by 0.05 alone
    classes, offsets = ssd.match(near, boxes, torch.tensor([3, 7]))
    assert classes.tolist() == [3, 3, 7, 0]
    torch.testing.assert_close(ssd.decode(offsets, near)[:3], boxes[[0, 0, 1]], rtol=0, atol=1e-6)


def test_an_image_without_objects_is_all_background(ssd: Any, task: Any) -> None:
    classes, offsets = ssd.match(ssd.default_boxes(128), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert not classes.any()
    assert not offsets.any()
    images = torch.zeros(2, 3, 128, 128)
    assert task.loss(task.model(), (images, [scene(task, [])] * 2)) == 0


def test_suppression_is_that_of_the_plain_loop(ssd: Any) -> None:
    boxes, scores = random_boxes(120), torch.rand(120, generator=torch.Generator().manual_seed(1))
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(ssd.iou(boxes[[index]], boxes[[other]]) <= ssd.MOST_OVERLAP for other in kept):
            kept.append(index)
    assert ssd.suppress(boxes, scores).tolist() == kept
    assert 10 < len(kept) < 110


def test_boxes_of_different_classes_do_not_suppress_each_other(ssd: Any) -> None:
    scores = torch.tensor([[0.0, 5.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.5]])  # of background, one class, another
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]]).repeat(3, 1)
    found = ssd.detect(scores, boxes)
    assert found[:, 5].tolist() == [1, 2]
    torch.testing.assert_close(found[:, 4], scores.softmax(1)[[0, 2], [1, 2]])


def test_the_hardest_background_is_trained_three_for_each_object(task: Any) -> None:
    losses = torch.tensor([[9.0, 1, 2, 3, 4, 5], [1.0, 2, 3, 4, 5, 6]])
    is_object = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    assert task.hardest(losses, is_object).tolist() == [[False, False, False, True, True, True], [False] * 6]


def test_perfect_detections_have_a_precision_of_one_and_none_has_zero(task: Any) -> None:
    scenes = [s for _, s in task.data("val").scenes]
    perfect = [np.concatenate((s.boxes, np.ones((len(s.boxes), 1)), s.classes[:, None]), 1) for s in scenes]
    assert task.average_precision(scenes, perfect) == pytest.approx({"ap": 1, "ap50": 1})
    assert task.average_precision(scenes, [np.zeros((0, 6))] * len(scenes)) == {"ap": 0, "ap50": 0}
    wrong = [np.concatenate((rows[:, :5], rows[:, 5:] % 10 + 1), 1) for rows in perfect]
    assert task.average_precision(scenes, wrong)["ap50"] < 0.05


def test_a_box_a_little_off_counts_at_the_lower_thresholds_alone(task: Any) -> None:
    truth = scene(task, [(0, 0, 100, 100, 1, 0)], (200, 100))
    found = np.array([[0, 0, 0.5, 0.72, 0.9, 1]])  # IoU 0.72: five thresholds of ten
    assert task.average_precision([truth], [found]) == pytest.approx({"ap": 0.5, "ap50": 1})


def test_what_is_found_in_a_crowd_is_no_mistake(task: Any) -> None:
    truth = scene(task, [(0, 0, 20, 20, 1, 0), (50, 50, 128, 128, 1, 1)])
    found = np.array([[60, 60, 80, 80, 128 * 0.9, 128], [0, 0, 20, 20, 128 * 0.5, 128]]) / 128
    assert task.average_precision([truth], [found]) == pytest.approx({"ap": 1, "ap50": 1})


def coco_folder(folder: Path) -> Path:
    """Two images of 40 x 20: one with a white box of class 90 and a crowd, one without an object."""
    boxes = [{"bbox": [10, 5, 20, 10], "category_id": 90}, {"bbox": [0, 0, 8, 8], "category_id": 2, "iscrowd": 1}]
    flat = {"bbox": [0, 0, 0, 8], "category_id": 2}
    content = {
        "images": [{"id": 7 * n, "file_name": f"{n}.png", "width": 40, "height": 20} for n in (1, 2)],
        "categories": [{"id": 90}, {"id": 2}],
        "annotations": [{"id": n, "image_id": 7, **about} for n, about in enumerate([*boxes, flat])],
    }
    pixels = np.zeros((20, 40), dtype=np.uint8)
    pixels[5:15, 10:30] = 255
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for number, image in ((1, pixels), (2, pixels * 0)):
            Image.fromarray(image).save(folder / f"{split}2017" / f"{number}.png")
    return folder


def test_a_folder_of_coco_is_read(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCO_DIR", str(coco_folder(tmp_path)))
    val, train = task.data("val"), task.data("train")
    assert (len(val), len(train)) == (2, 1)
    image, found = val[0]
    assert image.shape == (3, 128, 128)
    assert found.size == (40, 20)
    assert found.classes.tolist() == [2, 1]  # by the order of the ids
    assert found.is_crowd.tolist() == [False, True]
    torch.testing.assert_close(found.boxes, torch.tensor([[0.25, 0.25, 0.75, 0.75], [0, 0, 0.2, 0.4]]))
    assert len(val[1][1].boxes) == 0
    assert task.model().num_scores == 3


def test_images_have_300_pixels_for_coco(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCO_DIR", str(coco_folder(tmp_path)))
    monkeypatch.delenv("DETECTION_SIDE")
    assert task.data("val")[0][0].shape == (3, 300, 300)


def test_boxes_follow_their_objects_through_crops_and_flips(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCO_DIR", str(coco_folder(tmp_path)))
    monkeypatch.setenv("DETECTION_SIDE", "300")
    train = task.data("train")
    torch.manual_seed(0)
    areas = set[float]()
    for _ in range(40):
        image, found = train[0]
        assert found.classes.tolist() == [2]
        x1, y1, x2, y2 = (found.boxes[0] * 300).round().int().tolist()
        assert 0 <= x1 < x2 <= 300
        is_white = image[0] > 0
        assert is_white[y1 + 12 : y2 - 12, x1 + 12 : x2 - 12].all()
        assert is_white.sum() <= (x2 - x1 + 24) * (y2 - y1 + 24)
        areas.add(float((found.boxes[0, 2] - found.boxes[0, 0]) * (found.boxes[0, 3] - found.boxes[0, 1])))
    assert len(areas) > 10


def test_a_wrong_folder_or_side_is_one_clear_message(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TaskError, match="this model is not for images of 300 x 300"):
        task.run(task.model(), torch.zeros(1, 3, 300, 300))
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    with pytest.raises(TaskError, match=r"there is no .*instances_train2017\.json"):
        task.data("train")


def test_ssd300_has_a_prediction_for_every_default_box(task: Any) -> None:
    with torch.device("meta"):
        scores, offsets = task.ssd300()(torch.empty(2, 3, 300, 300))
    assert scores.shape == (2, 8732, 11)
    assert offsets.shape == (2, 8732, 4)


def test_each_prediction_is_made_at_the_place_of_its_default_box(task: Any) -> None:
    model, near = task.model().eval(), task.default_boxes(128)
    images = torch.zeros(1, 3, 128, 128)
    changed = images.clone()
    changed[..., :16, 112:] = 9  # the corner at the right, on top
    moved = (model(changed)[0] - model(images)[0]).abs().sum(-1)[0]
    first = 16 * 16 * 6  # boxes of the finest map, which see the least around them
    most = near[:first][moved[:first].topk(20).indices]
    assert most[:, 0].mean() > 0.75
    assert most[:, 1].mean() < 0.25


def test_a_few_steps_lower_the_loss(task: Any) -> None:
    torch.manual_seed(0)
    model, val = task.model(), DataLoader(task.data("val"), 8, collate_fn=task.collate)
    batch = next(iter(val))
    optimizer = task.optimizer(list(model.parameters()))
    losses: list[float] = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        metrics = task.evaluate(model.eval(), [batch])
    assert 0 <= metrics["ap"] <= metrics["ap50"] <= 1
