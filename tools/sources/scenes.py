"""Scenes for detection: items of clothing, at random places and scales, on crops of aerial photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128
MOST_ITEMS = 6
SCALES = (0.7, 2.0)  # of items of 28 x 28 pixels
BRIGHTNESS = (0.3, 0.8)  # of photos, so that dark items can be told from the ground as well
MOST_OVERLAP = 0.15  # IoU of two items
INK = 12  # what is darker is no part of an item
LEAST_INK = 20  # pixels
NUM_TRIES = 8

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, the last two beyond the box
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """Pixels [H, W] or [H, W, 3], and the boxes of what is in them, each with its class from 0."""

    pixels: Pixels
    boxes: Sequence[Box]
    classes: Sequence[int]


def compose(items: Pixels, labels: Pixels, photos: Sequence[Pixels], seed: int) -> Iterator[Picture]:
    """Scenes of SIDE x SIDE pixels without end, equal for equal arguments: items [N, 28, 28] on grey photos [H, W]."""
    rng = np.random.default_rng(seed)
    while True:
        canvas = _ground(rng, photos)
        boxes: list[Box] = []
        classes: list[int] = []
        for _ in range(rng.integers(1, MOST_ITEMS + 1)):
            index = int(rng.integers(len(items)))
            item = _scaled(items[index], float(rng.uniform(*SCALES)))
            box = _free_place(rng, item.shape, boxes) if (item > INK).sum() >= LEAST_INK else None
            if box is not None:
                _paste(canvas, item, box)
                boxes.append(box)
                classes.append(int(labels[index]))
        yield Picture(canvas, boxes, classes)


def iou(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _ground(rng: np.random.Generator, photos: Sequence[Pixels]) -> Pixels:
    photo = photos[int(rng.integers(len(photos)))]
    y, x = (int(rng.integers(0, size - SIDE + 1)) for size in photo.shape)
    return (photo[y : y + SIDE, x : x + SIDE] * rng.uniform(*BRIGHTNESS)).astype(np.uint8)


def _scaled(item: Pixels, scale: float) -> Pixels:
    """The item at its new size, cut to its ink."""
    side = round(item.shape[0] * scale)
    pixels = np.asarray(Image.fromarray(item).resize((side, side), Image.Resampling.BILINEAR))
    rows, columns = np.nonzero(pixels > INK)
    if not len(rows):
        return pixels[:0, :0]
    return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _free_place(rng: np.random.Generator, shape: tuple[int, ...], taken: Sequence[Box]) -> Box | None:
    height, width = shape
    for _ in range(NUM_TRIES):
        y, x = int(rng.integers(0, SIDE - height + 1)), int(rng.integers(0, SIDE - width + 1))
        box = (x, y, x + width, y + height)
        if all(iou(box, other) < MOST_OVERLAP for other in taken):
            return box
    return None


def _paste(canvas: Pixels, item: Pixels, box: Box) -> None:
    view = canvas[box[1] : box[3], box[0] : box[2]]
    view[item > INK] = item[item > INK]
