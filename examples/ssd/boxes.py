"""Boxes of SSD: the default ones, which of them has which object, their offsets, and what is left of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

CENTRE_SCALE, SIZE_SCALE = 0.1, 0.2  # offsets are divided by them, so that they are about as large as scores
LEAST_IOU = 0.5  # of a default box with an object, to be trained for it
LEAST_SCORE, MOST_OVERLAP = 0.05, 0.5
MOST_CANDIDATES, MOST_DETECTIONS = 400, 200  # of an image, before and after suppression


@dataclass(frozen=True)
class Level:
    """Default boxes of one map of features: squares of `small` pixels and of its mean with `large`, and oblong ones."""

    num_cells: int  # along a side
    step: int  # pixels from one cell to the next
    small: int
    large: int
    ratios: tuple[int, ...]

    @property
    def num_shapes(self) -> int:
        return 2 + 2 * len(self.ratios)

    def boxes(self, side: int) -> Tensor:
        """Centre x, y, width, height as shares of an image of `side`: [cells x cells x shapes, 4], row by row."""
        shapes = [(self.small, self.small), ((self.small * self.large) ** 0.5,) * 2]
        for ratio in self.ratios:
            long, short = self.small * ratio**0.5, self.small / ratio**0.5
            shapes += [(long, short), (short, long)]
        centres = (torch.arange(self.num_cells) + 0.5) * self.step
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        places = rearrange(torch.stack((x, y), -1), "h w xy -> (h w) 1 xy").expand(-1, len(shapes), 2)
        sizes = torch.tensor(shapes).expand(len(places), -1, 2)
        return (torch.cat((places, sizes), -1).flatten(0, 1) / side).clamp(0, 1)


# Side of the images -> levels; those of 300 are the paper's for COCO.
LEVELS = {
    128: (Level(16, 8, 18, 28, (2, 3)), Level(8, 16, 28, 42, (2, 3)), Level(4, 32, 42, 60, (2, 3))),
    300: (
        Level(38, 8, 21, 45, (2,)),
        Level(19, 16, 45, 99, (2, 3)),
        Level(10, 32, 99, 153, (2, 3)),
        Level(5, 64, 153, 207, (2, 3)),
        Level(3, 100, 207, 261, (2,)),
        Level(1, 300, 261, 315, (2,)),
    ),
}


@functools.cache
def default_boxes(side: int) -> Tensor:
    """Every default box of images of `side`: centre x, y, width, height as shares, [A, 4]."""
    if side not in LEVELS:
        raise ValueError(f"there are no default boxes for images of {side} pixels: set $DETECTION_SIDE to 128 or 300")
    return torch.cat([level.boxes(side) for level in LEVELS[side]])


def corners(boxes: Tensor) -> Tensor:
    """Centre x, y, width, height to x1, y1, x2, y2: [..., 4]."""
    centres, halves = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centres - halves, centres + halves), -1)


def encode(boxes: Tensor, near: Tensor) -> Tensor:
    """Offsets that make default boxes `near` (centre and size) into `boxes` (corners): [..., 4] each."""
    centres, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    moves = (centres - near[..., :2]) / near[..., 2:] / CENTRE_SCALE
    return torch.cat((moves, (sizes / near[..., 2:]).log() / SIZE_SCALE), -1)


def decode(offsets: Tensor, near: Tensor) -> Tensor:
    """The boxes (corners) that `offsets` make of default boxes: the inverse of `encode`."""
    centres = near[..., :2] + offsets[..., :2] * CENTRE_SCALE * near[..., 2:]
    return corners(torch.cat((centres, near[..., 2:] * (offsets[..., 2:] * SIZE_SCALE).exp()), -1))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` [N, 4] with every one of `b` [M, 4], all by corners: [N, M]."""
    shared = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(1e-9)


def match(near: Tensor, boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """For each default box [A, 4] its class [A], 0 for background, and its offsets [A, 4] to the box that it has.

    It takes the box that it overlaps most, by LEAST_IOU or more; the best one for a box takes that box in any case.
    """
    if not len(boxes):
        return torch.zeros(len(near), dtype=torch.long, device=near.device), torch.zeros_like(near)
    overlaps = iou(corners(near), boxes)
    best, index = overlaps.max(1)
    taken = overlaps.argmax(0)
    index[taken] = torch.arange(len(boxes), device=near.device)
    best[taken] = 1
    return torch.where(best >= LEAST_IOU, classes[index], 0), encode(boxes[index], near)


def suppress(boxes: Tensor, scores: Tensor) -> Tensor:
    """Indices, best first, of boxes [N, 4] that no kept box with a better score overlaps by more than MOST_OVERLAP."""
    order = scores.argsort(descending=True, stable=True)
    is_over = (iou(boxes[order], boxes[order]) > MOST_OVERLAP).cpu().numpy()
    is_kept = np.ones(len(order), dtype=bool)
    for index in range(len(order)):
        if is_kept[index]:
            is_kept[index + 1 :] &= ~is_over[index, index + 1 :]
    return order[torch.from_numpy(is_kept).to(order.device)]


def detect(scores: Tensor, boxes: Tensor) -> Tensor:
    """Detections of one image, best first, [D, 6]: box, score, class; from scores [A, 1 + C], boxes [A, 4]."""
    shares = scores.softmax(-1)[:, 1:].flatten()
    found = shares.topk(min(MOST_CANDIDATES, len(shares))).indices
    found = found[shares[found] > LEAST_SCORE]
    num_classes = scores.shape[1] - 1
    classes, boxes = found % num_classes, boxes[found // num_classes].clamp(0, 1)
    # Boxes of different classes are moved apart, so that only those of one class suppress each other.
    kept = suppress(boxes + 2 * classes[:, None], shares[found])[:MOST_DETECTIONS]
    return torch.cat((boxes[kept], shares[found[kept], None], classes[kept, None] + 1.0), -1)
