"""Image classification at full size: ResNet-50 v1.5 on ImageNet, by the recipe of the grow-and-prune paper.

    IMAGENET_DIR=imagenet gapfx sparsify examples/imagenet.py --out runs/imagenet

$IMAGENET_DIR names a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG; there can be any number of classes. The
groups are the four stages, `layer1` .. `layer4`. gapfx puts a layer outside of them into the group of what runs before
it, and what runs first into the first: conv1 grows with layer1, fc with layer4. So every weight gets its chance; the
authors' code prunes both and leaves them in no group. `gapfx plan examples/imagenet.py --input 2x3x224x224` shows the
groups without data.

Phases take 30 epochs, each with an optimizer and a learning rate of its own. For a first look give `--rounds 1
--phase-epochs 5 --finetune-epochs 20`. The batch is 1,024 over all ranks and passes of --micro-batch; with another one
the learning rate has to change alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from gapfx.errors import TaskError

Batch = tuple[Tensor, Tensor]  # images [B, 3, SIDE, SIDE], classes [B]

SIDE = int(os.environ.get("IMAGENET_SIDE", "224"))
# Weight of mixed images, Beta(MIXUP, MIXUP): 0.2 in the paper's longer trainings, 0 for none.
MIXUP = float(os.environ.get("IMAGENET_MIXUP", "0"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VAL_SHARE = 224 / 256  # of the shorter side, in the middle
AREAS, ASPECTS = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops
NUM_CROPS = 10  # tries
NUM_READERS = 8  # threads
SMOOTHING = 0.1
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 1024, 1.024, 0.875, 3.05e-5
WARMUP = 8 * 1251  # steps in which the learning rate rises: 8 epochs; at most a third of a phase

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "partition": "stages",
    "groups": 4,
    "rounds": 7,
    "phase_epochs": 30,
    "finetune_epochs": 150,
    "state": "reset",
    "phase_lr": "restart",
    "batch_size": BATCH,
    "micro_batch": 128,
    "clip": 0,
    "eval_epochs": 10,
}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; in v1.5 the 3 x 3 has the stride."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = 4 * width
        self.conv1 = nn.Conv2d(num_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, num_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(num_out)
        self.downsample = nn.Sequential()
        if stride > 1 or num_in != num_out:
            self.downsample.extend((nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """Images [B, 3, H, W] -> scores of the classes [B, C]; its state_dict has the keys of torchvision's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, 3, 1)
        self.layer2 = stage(256, 128, 4, 2)
        self.layer3 = stage(512, 256, 6, 2)
        self.layer4 = stage(1024, 512, 3, 2)
        self.fc = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def stage(num_in: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; the first one has the stride."""
    rest = (Bottleneck(4 * width, width, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(Bottleneck(num_in, width, stride), *rest)


class Images(Dataset[Batch]):
    """Normalised images [3, SIDE, SIDE] and their classes, which are the folders of FOLDER/SPLIT in order.

    For training a random part of each, mirrored in half of the cases; else its middle.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.is_train = split == "train"
        classes = class_folders(folder, split)
        self.files = [(path, number) for number, one in enumerate(classes) for path in sorted(one.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """A whole batch at once, read by threads; each image has a seed, so that their order does not matter."""
        seeds = torch.randint(2**62, (len(indices),)).tolist()
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return list(readers.map(self.read, indices, seeds))

    def read(self, index: int, seed: int) -> Batch:
        path, number = self.files[index]
        generator = torch.Generator().manual_seed(seed)
        with Image.open(path) as file:
            image = file.convert("RGB")
        box = random_box(image.size, generator) if self.is_train else middle_box(image.size)
        values = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)))
        pixels = (values.permute(2, 0, 1).float() / 255 - column(MEAN)) / column(STD)
        is_mirrored = self.is_train and torch.rand((), generator=generator) < 0.5
        return pixels.flip(-1) if is_mirrored else pixels, torch.tensor(number)


Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


def middle_box(size: tuple[int, int]) -> Box:
    """What a centre crop of SIDE keeps of an image whose shorter side is scaled to SIDE / VAL_SHARE."""
    half = min(size) * VAL_SHARE / 2
    x, y = size[0] / 2, size[1] / 2
    return x - half, y - half, x + half, y + half


def random_box(size: tuple[int, int], generator: torch.Generator) -> Box:
    """A part of random area and aspect; the whole middle when none fits."""
    for _ in range(NUM_CROPS):
        share = torch.empty(()).uniform_(*AREAS, generator=generator).item()
        aspect = math.exp(torch.empty(()).uniform_(*map(math.log, ASPECTS), generator=generator).item())
        area = size[0] * size[1] * share
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= size[0] and 0 < height <= size[1]:
            x, y = (torch.rand(2, generator=generator) * torch.tensor((size[0] - width, size[1] - height))).tolist()
            return int(x), int(y), int(x) + width, int(y) + height
    return middle_box(size)


def column(values: tuple[float, ...]) -> Tensor:
    """One value for each channel: [3, 1, 1]."""
    return torch.tensor(values).view(3, 1, 1)


def class_folders(folder: Path, split: str) -> list[Path]:
    """The folders of a split, one a class. Raises TaskError when there is none."""
    found = sorted(path for path in (folder / split).glob("*") if path.is_dir())
    if not found:
        raise TaskError(f"$IMAGENET_DIR: {folder / split} has no folder of a class", fix="see that it is ImageNet's")
    return found


def data_folder() -> Path:
    """$IMAGENET_DIR. Raises TaskError when it is not set."""
    folder = os.environ.get("IMAGENET_DIR")
    if not folder:
        raise TaskError("$IMAGENET_DIR is not set: it names the folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    return Path(folder)


def model() -> nn.Module:
    """As many classes as there are folders, 1,000 without data."""
    return ResNet50(len(class_folders(data_folder(), "val")) if os.environ.get("IMAGENET_DIR") else 1000)


def data(split: str) -> Images:
    return Images(data_folder(), split)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy with smoothed classes; with MIXUP each image is mixed with another one of the batch."""
    images, classes = batch
    if not MIXUP:
        return F.cross_entropy(model(images), classes, label_smoothing=SMOOTHING)
    share = float(torch.distributions.Beta(MIXUP, MIXUP).sample())
    scores = model(share * images + (1 - share) * images.flip(0))
    pairs = ((share, classes), (1 - share, classes.flip(0)))
    return torch.stack([w * F.cross_entropy(scores, to, label_smoothing=SMOOTHING) for w, to in pairs]).sum()


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """`top1` and `top5`: shares of images whose class has the best score, or is among the best five."""
    num_right, num_near, num_images = 0, 0, 0
    for images, classes in loader:
        scores = model(images)
        best = scores.topk(min(5, scores.shape[1])).indices == classes[:, None]
        num_right, num_near = num_right + int(best[:, 0].sum()), num_near + int(best.sum())
        num_images += len(classes)
    return {"top1": num_right / num_images, "top5": num_near / num_images}


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD; norms and biases, which have one dimension, do not decay."""
    weights = [parameter for parameter in params if parameter.dim() > 1]
    rest = [parameter for parameter in params if parameter.dim() <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=LR, momentum=MOMENTUM)


def lr(step: int, num_steps: int) -> float:
    """A rise, then half a cosine to 0, anew in each phase."""
    rise = min(WARMUP, num_steps // 3)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(num_steps - rise, 1)))
