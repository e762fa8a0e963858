"""The tool that makes detection sets, and the scenes that come with the repository."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gapfx.errors import UserError
from tests.task_files import ROOT
from tools.sources.detection import CLOTHES, FINE, PHOTOS, cut_tiles, instances, read_photos, write_coco
from tools.sources.scenes import INK, MOST_OVERLAP, SIDE, Picture, compose, iou

SUBSET = ROOT / "examples" / "data" / "detection"


def some_scenes(seed: int, count: int = 30) -> list[Picture]:
    items = np.zeros((4, 28, 28), dtype=np.uint8)
    items[:3, 4:24, 8:20] = 255  # the last item has no ink
    photo = np.full((150, 140), INK - 2, dtype=np.uint8)
    return list(itertools.islice(compose(items, np.arange(4, dtype=np.uint8), [photo], seed), count))


def test_scenes_depend_on_the_seed_alone() -> None:
    for one, again in zip(some_scenes(0), some_scenes(0), strict=True):
        np.testing.assert_array_equal(one.pixels, again.pixels)
        assert one.boxes == again.boxes
    assert [s.boxes for s in some_scenes(0)] != [s.boxes for s in some_scenes(1)]


def test_boxes_fit_the_ink_of_their_items_and_hardly_overlap() -> None:
    for picture in some_scenes(0):
        assert picture.pixels.shape == (SIDE, SIDE)
        is_box = np.zeros((SIDE, SIDE), dtype=bool)
        for x1, y1, x2, y2 in picture.boxes:
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            is_box[y1:y2, x1:x2] = True
            for side in (np.s_[y1, x1:x2], np.s_[y2 - 1, x1:x2], np.s_[y1:y2, x1], np.s_[y1:y2, x2 - 1]):
                assert (picture.pixels[side] > INK).any()
        assert not (picture.pixels > INK)[~is_box].any()
        assert all(iou(a, b) < MOST_OVERLAP for a, b in itertools.combinations(picture.boxes, 2))
        assert 3 not in picture.classes


def test_the_committed_scenes_are_whole_and_small() -> None:
    for split, count in (("train", 224), ("val", 56)):
        content = json.loads((SUBSET / "annotations" / f"instances_{split}2017.json").read_text())
        names = {path.name for path in (SUBSET / f"{split}2017").iterdir()}
        assert len(content["images"]) == count
        assert {image["file_name"] for image in content["images"]} == names
        assert [category["name"] for category in content["categories"]] == list(CLOTHES)
        assert {one["category_id"] for one in content["annotations"]} == set(range(1, 11))
    assert sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file()) < 500_000


def test_pictures_are_written_in_the_layout_of_coco(tmp_path: Path) -> None:
    pictures = [Picture(np.zeros((8, 16), dtype=np.uint8), [(1, 2, 4, 8)], [1]), *some_scenes(0, 1)]
    write_coco(tmp_path / "val", pictures, ("cat", "dog"), "MIT", FINE)
    content = json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text())
    assert content == instances(pictures, ("cat", "dog"), FINE)
    assert content["images"][0] == {"id": 1, "file_name": "000000.jpg", "height": 8, "width": 16}
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 6], "area": 18, "iscrowd": 0}
    assert content["annotations"][0] == box
    with Image.open(tmp_path / "val2017" / "000000.jpg") as image:
        assert image.size == (16, 8)


def test_tiles_keep_the_boxes_that_they_hardly_cut() -> None:
    photo = Picture(np.zeros((300, 520, 3), dtype=np.uint8), [(250, 10, 270, 30), (300, 50, 340, 90)], [0, 0])
    first, second = cut_tiles(photo, 256)
    assert first.boxes == []  # 6 of 20 columns are not enough
    assert second.boxes == [(0, 10, 14, 30), (44, 50, 84, 90)]


def wheel(path: Path, num_boxes: int) -> Path:
    box = "<object><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>5</ymax></bndbox></object>"
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for number, stem in enumerate(PHOTOS):
            archive.writestr(f"deepforest/data/{stem}.png", png.getvalue())
            archive.writestr(f"deepforest/data/{stem}.xml", f"<a>{box * (num_boxes if number == 0 else 0)}</a>")
    return path


def test_photos_are_read_from_the_wheel_and_counted(tmp_path: Path) -> None:
    photos = read_photos(wheel(tmp_path / "whole.whl", 951))
    assert [len(photo.boxes) for photo in photos["train"]] == [951]
    assert photos["train"][0].boxes[0] == (1, 2, 3, 5)
    assert len(photos["val"]) == 3
    with pytest.raises(UserError, match="expected 951 boxes of trees in deepforest, got 950"):
        read_photos(wheel(tmp_path / "part.whl", 950))
    (tmp_path / "half.whl").write_bytes(b"half a file")
    with pytest.raises(UserError, match="a downloaded package cannot be read"):
        read_photos(tmp_path / "half.whl")
