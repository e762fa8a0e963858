"""Detection: SSD (Liu et al., 2016) with a ResNet backbone, sparse from the first step.

    gapfx sparsify examples/detection.py --out runs/detection

trains a small SSD on 224 scenes that come with this file: clothes of Fashion-MNIST on aerial photos.
`python tools/get_data.py detection` makes 4,000 of them, which are then used instead. On COCO, with ResNet-50:

    COCO_DIR=coco gapfx sparsify examples/detection.py --entry ssd300 --batch-size 32 --finetune-epochs 65

$COCO_DIR names a folder with annotations/instances_train2017.json, train2017/, and the same for val2017. Its images are
scaled to 300 x 300 and others to 128 x 128, or to $DETECTION_SIDE: `model` takes 128, `ssd300` takes 300. Networks and
boxes are in the folder ssd beside this file; the metric is that of pycocotools.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ssd import network
from ssd.boxes import decode, default_boxes, detect, iou, match
from torch import Tensor, nn
from torch.utils.data import Dataset

from gapfx.errors import TaskError

DATA = Path(__file__).parent / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels of ImageNet
NEGATIVES = 3  # default boxes of the background that are trained for each that has an object
CROP_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9)  # what is left in a crop overlaps it by one of them
NUM_CROPS = 20  # tries
WHOLE = torch.tensor((0.0, 0.0, 1.0, 1.0))
# Scenes of that size come in many scales; with crops as well, a short training learns little from them.
SMALL_SIDE = 128

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "dense": ("first",),
    "groups": 4,
    "rounds": 1,
    "phase_epochs": 4,
    "finetune_epochs": 20,
    "batch_size": 8,
    "eval_epochs": 6,
}


@dataclass(frozen=True)
class Scene:
    """What is in an image; boxes are x1, y1, x2, y2 as shares of its sides.

    No tensor of a batch, so that boxes stay in 32 bits where the model has 16.
    """

    boxes: Tensor  # [N, 4]
    classes: Tensor  # [N], from 1: 0 is the background
    is_crowd: Tensor  # bool [N]: a box over many objects, which counts in the evaluation alone
    size: tuple[int, int]  # width and height of the file in pixels

    def part(self, chosen: Tensor) -> Scene:
        """The objects that a bool [N] is True for."""
        return Scene(self.boxes[chosen], self.classes[chosen], self.is_crowd[chosen], self.size)


Batch = tuple[Tensor, list[Scene]]  # images [B, 3, S, S]


class Scenes(Dataset[tuple[Tensor, Scene]]):
    """Images [3, S, S] of a folder of COCO, normalised, and what is in them; those for training change each time.

    Images without an object are left out of the training.
    """

    def __init__(self, folder: Path, split: str, side: int) -> None:
        self.folder = folder / f"{split}2017"
        self.side = side
        self.is_train = split == "train"
        self.is_cropped = side > SMALL_SIDE
        scenes = read_scenes(read_annotations(folder, split))
        self.scenes = [(name, s) for name, s in scenes if not self.is_train or bool((~s.is_crowd).any())]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Scene]:
        name, scene = self.scenes[index]
        with Image.open(self.folder / name) as file:
            image = file.convert("RGB")
        if not self.is_train:
            return pixels(image.resize((self.side, self.side))), scene
        scene = scene.part(~scene.is_crowd)
        area, scene = crop(scene) if self.is_cropped else (WHOLE, scene)
        image = image.resize((self.side, self.side), box=scaled(area, image.size))
        return flip(pixels(image), scene) if torch.rand(()) < 0.5 else (pixels(image), scene)


def pixels(image: Image.Image) -> Tensor:
    """A normalised image [3, H, W]."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def scaled(area: Tensor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in shares as one in pixels."""
    x1, y1, x2, y2 = area.tolist()
    return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]


def crop(scene: Scene) -> tuple[Tensor, Scene]:
    """A random part of the image, [4] in shares, and the scene in it: the objects with their centres inside.

    Once in six times it is the whole image, as it is when no part is found that overlaps an object enough.
    """
    mode = int(torch.randint(len(CROP_IOUS) + 1, ()))
    if mode == len(CROP_IOUS):
        return WHOLE, scene
    for _ in range(NUM_CROPS):
        size = torch.empty(2).uniform_(0.3, 1)
        start = torch.rand(2) * (1 - size)
        area = torch.cat((start, start + size)).clamp(max=1)  # Pillow takes no box that is a rounding too large
        centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
        inside = scene.part(((centres > start) & (centres < start + size)).all(1))
        is_oblong = not 0.5 <= size[0] / size[1] <= 2
        if is_oblong or not len(inside.boxes) or iou(scene.boxes, area[None]).max() < CROP_IOUS[mode]:
            continue
        boxes = ((inside.boxes - start.repeat(2)) / size.repeat(2)).clamp(0, 1)
        return area, Scene(boxes, inside.classes, inside.is_crowd, inside.size)
    return WHOLE, scene


def flip(image: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
    """Image and boxes, left for right."""
    x1, y1, x2, y2 = scene.boxes.unbind(1)
    return image.flip(-1), Scene(torch.stack((1 - x2, y1, 1 - x1, y2), 1), scene.classes, scene.is_crowd, scene.size)


def read_annotations(folder: Path, split: str) -> dict[str, Any]:
    """The content of a file of COCO. Raises TaskError when it is not there."""
    path = folder / "annotations" / f"instances_{split}2017.json"
    if not path.is_file():
        raise TaskError(f"there is no {path}", fix="let $COCO_DIR name a folder in the layout of COCO, or unset it")
    return json.loads(path.read_text())


def read_scenes(content: Mapping[str, Any]) -> list[tuple[str, Scene]]:
    """Name of the file and scene of each image; the classes are those of COCO in the order of their ids, from 1."""
    ids = sorted(category["id"] for category in content["categories"])
    rows: dict[int, list[tuple[float, ...]]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        if width > 0 and height > 0:
            number = 1 + ids.index(one["category_id"])
            rows[one["image_id"]].append((x, y, x + width, y + height, number, one.get("iscrowd", 0)))
    return [(image["file_name"], make_scene(rows[image["id"]], image)) for image in content["images"]]


def make_scene(rows: Sequence[tuple[float, ...]], image: Mapping[str, int]) -> Scene:
    """A scene from rows of x1, y1, x2, y2 in pixels, class, is_crowd."""
    size = (image["width"], image["height"])
    values = torch.tensor(rows, dtype=torch.float64).view(-1, 6)
    boxes = values[:, :4] / torch.tensor(size * 2)
    return Scene(boxes.float(), values[:, 4].long(), values[:, 5].bool(), size)


def data_folder() -> Path:
    """$COCO_DIR, else the scenes that were fetched, else the subset."""
    if folder := os.environ.get("COCO_DIR"):
        return Path(folder)
    full = DATA / "detection-full"
    return full if (full / "annotations" / "instances_val2017.json").is_file() else DATA / "detection"


@functools.cache
def count_classes(folder: Path) -> int:
    return len(read_annotations(folder, "val")["categories"])


def model() -> nn.Module:
    return network.small_ssd(count_classes(data_folder()))


def ssd300() -> nn.Module:
    return network.ssd300(count_classes(data_folder()))


def data(split: str) -> Scenes:
    side = os.environ.get("DETECTION_SIDE") or (300 if os.environ.get("COCO_DIR") else SMALL_SIDE)
    return Scenes(data_folder(), split, int(side))


def collate(samples: list[tuple[Tensor, Scene]]) -> Batch:
    """Images have one size, scenes do not."""
    images, scenes = zip(*samples, strict=True)
    return torch.stack(images), list(scenes)


def hardest(losses: Tensor, is_object: Tensor) -> Tensor:
    """Default boxes of the background that are trained on: NEGATIVES for each object, by loss; bool [B, A]."""
    order = losses.detach().masked_fill(is_object, -1).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < NEGATIVES * is_object.sum(1, keepdim=True)) & ~is_object


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Smooth L1 of offsets plus cross-entropy of classes for each matched default box, then the mean over images."""
    images, scenes = batch
    near = default_boxes(images.shape[-1]).to(images.device)
    scores, offsets = run(model, images)
    pairs = [match(near, *(x[~s.is_crowd].to(near.device) for x in (s.boxes, s.classes))) for s in scenes]
    classes, targets = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    is_object = classes > 0
    class_losses = F.cross_entropy(scores.transpose(1, 2), classes, reduction="none")
    box_losses = F.smooth_l1_loss(offsets, targets, reduction="none").sum(-1)
    is_trained = is_object | hardest(class_losses, is_object)
    totals = (box_losses * is_object + class_losses * is_trained).sum(1)
    return (totals / is_object.sum(1).clamp(1)).mean()


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and offsets in 32 bits. Raises TaskError when the model is for images of another side."""
    scores, offsets = (x.float() for x in model(images))
    side = images.shape[-1]
    if scores.shape[1] != len(default_boxes(side)):
        raise TaskError(
            f"this model is not for images of {side} x {side}",
            fix="take --entry ssd300 with DETECTION_SIDE=300, or the model without --entry with DETECTION_SIDE=128",
        )
    return scores, offsets


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """`ap`: average precision, mean over IoU of 0.5 to 0.95 and over classes, as COCO has it; `ap50`: at IoU 0.5."""
    all_scenes: list[Scene] = []
    found: list[NDArray[np.float64]] = []
    for images, scenes in loader:
        scores, offsets = run(model, images)
        boxes = decode(offsets, default_boxes(images.shape[-1]).to(images.device))
        found += [detect(*pair).double().cpu().numpy() for pair in zip(scores, boxes, strict=True)]
        all_scenes += scenes
    return average_precision(all_scenes, found)


def average_precision(scenes: Sequence[Scene], found: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """`ap` and `ap50` of detections [D, 6] (box, score, class) for each scene, by pycocotools in pixels of files."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth: Any = COCO()  # its stubs know no classes of one's own
        truth.dataset = ground_truth(scenes)
        truth.createIndex()
        rows = [
            in_pixels(number, rows, scene) for number, (rows, scene) in enumerate(zip(found, scenes, strict=True), 1)
        ]
        if not sum(map(len, rows)):
            return {"ap": 0.0, "ap50": 0.0}  # pycocotools takes no empty list
        judge = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"ap": float(judge.stats[0]), "ap50": float(judge.stats[1])}


def in_pixels(number: int, rows: NDArray[np.float64], scene: Scene) -> NDArray[np.float64]:
    """Rows of pycocotools, [D, 7]: number of the image, x, y, width, height, score, class."""
    x1, y1, x2, y2 = (rows[:, :4] * (scene.size * 2)).T
    return np.stack((np.full(len(rows), number), x1, y1, x2 - x1, y2 - y1, rows[:, 4], rows[:, 5]), 1)


def ground_truth(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scenes as COCO's annotations, images numbered from 1."""
    objects: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        corners = (scene.boxes.double() * torch.tensor(scene.size * 2)).tolist()
        for (x1, y1, x2, y2), label, is_crowd in zip(
            corners, scene.classes.tolist(), scene.is_crowd.tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            about = {"id": len(objects) + 1, "image_id": number, "category_id": label, "iscrowd": int(is_crowd)}
            objects.append({**about, "bbox": box, "area": box[2] * box[3]})
    categories = sorted({one["category_id"] for one in objects})
    images = [{"id": number} for number in range(1, len(scenes) + 1)]
    return {"images": images, "annotations": objects, "categories": [{"id": label} for label in categories]}


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)
