"""Image classification: a small ResNet on Fashion-MNIST, sparse from the first step.

    gapfx sparsify examples/fashion.py --out runs/fashion

It trains on 10,000 real images that come with this file and is judged on 2,000 others.
`python tools/get_data.py fashion` fetches all of them, 50,000 and 10,000, which are then used instead;
$FASHION_MNIST_DIR names another folder with a fashion.npz. The split "test" is that of Fashion-MNIST itself.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]  # images [B, 1, 28, 28], classes [B]

DATA = Path(__file__).parent / "data"
MEAN, STD = 0.286, 0.353  # of the training pixels
VAL_EVERY = 6  # one image in so many of those for training is held out
NUM_CLASSES = 10

# Command-line flags win over these.
defaults = {
    "sparsity": 0.9,
    "dense": ("first",),  # the stem has 144 weights: with 14 of them left, results depend on luck
    "groups": 3,
    "rounds": 2,
    "phase_epochs": 5,
    "finetune_epochs": 12,
    "batch_size": 64,
}


class Block(nn.Module):
    """A basic residual block; GroupNorm, because its result does not depend on how a batch is split over ranks."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(num_out // 8, num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(num_out // 8, num_out)
        is_same = stride == 1 and num_in == num_out
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """A stem, one residual block for each width, and a linear classifier; a wider block halves the image."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(widths[0] // 8, widths[0])
        pairs = itertools.pairwise([widths[0], *widths])
        self.blocks = nn.Sequential(*(Block(num_in, num_out, 1 + (num_out > num_in)) for num_in, num_out in pairs))
        self.classifier = nn.Linear(widths[-1], NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.classifier(x.mean((2, 3)))


class Images(Dataset[Batch]):
    """Normalised images and their classes; half of the training images are mirrored, anew each time."""

    def __init__(self, split: str) -> None:
        source = "val" if split == "test" else "train"  # by the names in the file
        with np.load(data_folder() / "fashion.npz") as file:
            images, classes = file[f"{source}_images"], file[f"{source}_labels"]
        if split != "test":
            is_held_out = np.arange(len(classes)) % VAL_EVERY == VAL_EVERY - 1
            chosen = is_held_out if split == "val" else ~is_held_out
            images, classes = images[chosen], classes[chosen]
        self.images = torch.from_numpy(images).unsqueeze(1).float().div(255).sub(MEAN).div(STD)
        self.classes = torch.from_numpy(classes).long()
        self.is_train = split == "train"

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """A whole batch at once: what a DataLoader calls when it is there."""
        images = self.images[indices]
        if self.is_train:
            is_mirrored = torch.rand(len(indices), 1, 1, 1) < 0.5
            images = torch.where(is_mirrored, images.flip(-1), images)
        return list(zip(images, self.classes[indices], strict=True))


def data_folder() -> Path:
    """$FASHION_MNIST_DIR, else the full set when it was fetched, else the subset."""
    if folder := os.environ.get("FASHION_MNIST_DIR"):
        return Path(folder)
    full = DATA / "fashion-full"
    return full if (full / "fashion.npz").is_file() else DATA / "fashion"


def model() -> nn.Module:
    return ResNet()


def at_half_size() -> nn.Module:
    """The same network on images of 14 x 14, which takes a third of the time: for studies of many runs."""
    return nn.Sequential(nn.AvgPool2d(2), ResNet())


def data(split: str) -> Images:
    return Images(split)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    images, classes = batch
    return F.cross_entropy(model(images), classes)


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """Accuracy and mean loss over all images of the loader."""
    num_right, total_loss, num_images = 0, 0.0, 0
    for images, classes in loader:
        scores = model(images).float()
        num_right += int((scores.argmax(1) == classes).sum())
        total_loss += float(F.cross_entropy(scores, classes, reduction="sum"))
        num_images += len(classes)
    return {"accuracy": num_right / num_images, "loss": total_loss / num_images}


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
