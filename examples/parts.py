"""3D part segmentation: PointNet++ (multi-scale grouping) on electronic components, sparse from the first step.

    gapfx sparsify examples/parts.py --out runs/parts

It trains on 200 point clouds of KiCad's 3D models that come with this file. `python tools/get_data.py parts` fetches
more of them, which are then used instead; $PARTS_FILE names another such file, $SHAPENET_PART_DIR a folder of
ShapeNetPart (with normals), which wins. `examples/parts.py:reference` is the model at its published size.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from gapfx.errors import UserError

# points [B, N, 6] as positions and normals, categories [B], parts [B, N], the parts of the shape's category [B, P]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]

DATA = Path(__file__).parent / "data"
NUM_POINTS = int(os.environ.get("PARTS_POINTS", "512"))  # that the model sees; published: 2048
UNIT, NORMAL_UNIT = 1 / 1024, 1 / 127  # of the numbers in parts.npz
REFERENCE_POINTS = 2048  # for which the sizes of neighbourhoods below are given
FETCH = "fetch it again with `python tools/get_data.py parts`"
# Parts of each category of ShapeNetPart; they are numbered through in this order.
SHAPENET_PARTS = {
    "Airplane": 4,
    "Bag": 2,
    "Cap": 2,
    "Car": 4,
    "Chair": 4,
    "Earphone": 3,
    "Guitar": 3,
    "Knife": 2,
    "Lamp": 4,
    "Laptop": 2,
    "Motorbike": 6,
    "Mug": 2,
    "Pistol": 3,
    "Rocket": 3,
    "Skateboard": 3,
    "Table": 3,
}

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "group": ("sa1.*", "sa2.*", "sa3.*", "fp3.*", "fp2.*", "fp1.*|head.*|classifier.*"),
    "rounds": 1,
    "phase_epochs": 6,
    "finetune_epochs": 24,
    "batch_size": 16,
    "eval_epochs": 8,
}


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Of all pairs of places a [B, S, 3] and b [B, N, 3]: [B, S, N]."""
    return (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Rows of values [B, N, C] at indices [B, ...]: [B, ..., C]."""
    flat = indices.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).unflatten(1, indices.shape[1:])


def farthest_points(places: Tensor, count: int) -> Tensor:
    """Indices [B, count]: the first point, then each time the one that is farthest from all chosen before it."""
    with torch.no_grad():
        last = torch.zeros(len(places), 1, dtype=torch.long, device=places.device)
        chosen, nearest = [last], squared_distances(take(places, last), places)[:, 0]
        for _ in range(count - 1):
            last = nearest.argmax(1, keepdim=True)
            nearest = torch.minimum(nearest, squared_distances(take(places, last), places)[:, 0])
            chosen.append(last)
        return torch.cat(chosen, 1)


def ball_query(places: Tensor, centres: Tensor, radius: float, count: int) -> Tensor:
    """Indices [B, S, count] of the first points within the radius; where there are fewer, the first of them again."""
    with torch.no_grad():
        is_far = squared_distances(centres, places) > radius**2
        order = torch.arange(places.shape[1], device=places.device).expand_as(is_far)
        found = order.masked_fill(is_far, places.shape[1]).topk(min(count, places.shape[1]), largest=False).values
        return torch.where(found == places.shape[1], found[..., :1], found)


def interpolate(places: Tensor, known_places: Tensor, known: Tensor) -> Tensor:
    """Features [B, N, C] at places: the mean of the three nearest of known [B, S, C], weighted by 1 / distance^2."""
    distances, nearest = squared_distances(places, known_places).topk(3, largest=False)
    weights = 1 / (distances + 1e-8)
    return (take(known, nearest) * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)).sum(2)


class Layers(nn.Module):
    """Linear layers, each with batch norm and ReLU, on every point alone: [..., C] to [..., widths[-1]]."""

    def __init__(self, num_in: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(zip([num_in, *widths[:-1]], widths, strict=True))
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            flat = F.relu(norm(linear(flat)))
        return flat.unflatten(0, x.shape[:-1])


class SetAbstraction(nn.Module):
    """Features of `share` of the points: the maximum over neighbourhoods of several radii, side by side."""

    def __init__(self, num_in: int, share: int, scales: Sequence[tuple[float, int, Sequence[int]]]) -> None:
        super().__init__()
        self.share = share
        self.balls = [(radius, count) for radius, count, _ in scales]
        self.scales = nn.ModuleList(Layers(num_in + 3, widths) for _, _, widths in scales)

    def forward(self, places: Tensor, features: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """Centres [B, N / share, 3] and their features, of N points of the whole cloud."""
        centres = take(places, farthest_points(places, max(num_points // self.share, 3)))
        found: list[Tensor] = []
        for (radius, count), layers in zip(self.balls, self.scales, strict=True):
            # As many neighbours as the density of the cloud gives: the published counts are for 2048 points.
            indices = ball_query(places, centres, radius, max(count * num_points // REFERENCE_POINTS, 4))
            offsets = take(places, indices) - centres.unsqueeze(2)
            found.append(layers(torch.cat((take(features, indices), offsets), -1)).amax(2))
        return centres, torch.cat(found, -1)


class PointNet2(nn.Module):
    """PointNet++ MSG for parts (Qi et al., 2017): sizes of its PyTorch port, all widths times `width`."""

    def __init__(self, num_categories: int, num_parts: int, width: float) -> None:
        super().__init__()

        def scaled(*widths: int) -> list[int]:
            return [max(8, int(number * width)) for number in widths]

        first = [(0.1, 32, scaled(32, 32, 64)), (0.2, 64, scaled(64, 64, 128)), (0.4, 128, scaled(64, 96, 128))]
        second = [(0.4, 64, scaled(128, 128, 256)), (0.8, 128, scaled(128, 196, 256))]
        num_first, num_second = (sum(widths[-1] for _, _, widths in scales) for scales in (first, second))
        self.num_categories = num_categories
        self.sa1 = SetAbstraction(6, 4, first)
        self.sa2 = SetAbstraction(num_first, 16, second)
        self.sa3 = Layers(num_second + 3, scaled(256, 512, 1024))
        self.fp3 = Layers(num_second + scaled(1024)[0], scaled(256, 256))
        self.fp2 = Layers(num_first + scaled(256)[0], scaled(256, 128))
        self.fp1 = Layers(num_categories + 9 + scaled(128)[0], scaled(128, 128))
        self.head = Layers(scaled(128)[0], scaled(128))
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(scaled(128)[0], num_parts)

    def forward(self, points: Tensor, categories: Tensor) -> Tensor:
        """Scores [B, N, P] of all parts, those of other categories too."""
        num_points, places = points.shape[1], points[..., :3]
        places1, features1 = self.sa1(places, points, num_points)
        places2, features2 = self.sa2(places1, features1, num_points)
        whole = self.sa3(torch.cat((features2, places2), -1)).amax(1, keepdim=True)
        up2 = self.fp3(torch.cat((features2, whole.expand(-1, places2.shape[1], -1)), -1))
        up1 = self.fp2(torch.cat((features1, interpolate(places1, places2, up2)), -1))
        one_hot = F.one_hot(categories, self.num_categories).to(points.dtype).unsqueeze(1).expand(-1, num_points, -1)
        up0 = self.fp1(torch.cat((one_hot, places, points, interpolate(places, places1, up1)), -1))
        return self.classifier(self.dropout(self.head(up0)))


class Clouds(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Point clouds in the unit ball, NUM_POINTS of each; in training, other ones each time, scaled and shifted.

    Points come in a random order: where a file has them sorted by part, their place would tell it.
    """

    def __init__(self, split: str) -> None:
        self.is_train = split == "train"

    def read(self, index: int) -> tuple[Tensor, int, Tensor, Tensor]:
        """Points [M, 6], category, parts [M] and the parts of the category [P] of one shape."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        points, category, parts, is_allowed = self.read(index)
        generator = None if self.is_train else torch.Generator().manual_seed(index)
        order = torch.randperm(len(points), generator=generator)
        order = order.repeat(-(-NUM_POINTS // len(order)))[:NUM_POINTS]
        points = points[order]
        if self.is_train:
            scale, shift = 0.8 + 0.45 * torch.rand(()), 0.2 * torch.rand(3) - 0.1
            points = torch.cat((points[:, :3] * scale + shift, points[:, 3:]), 1)
        return points, torch.tensor(category), parts[order], is_allowed


class Components(Clouds):
    """The shapes of a parts.npz; "test" takes every second one of those that it holds out, "val" the others."""

    def __init__(self, path: Path, split: str) -> None:
        super().__init__(split)
        source, chosen = ("train", slice(None)) if split == "train" else ("val", slice(split == "test", None, 2))
        try:
            with np.load(path) as file:
                fields = [file[f"{source}_{n}"][chosen] for n in ("positions", "normals", "parts", "categories")]
                is_allowed = file["parts_of_category"]
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path.name} cannot be used: {error}", where=str(path), fix=FETCH) from error
        positions, normals, parts, categories = map(torch.from_numpy, fields)
        points = torch.cat((positions * UNIT, normals * NORMAL_UNIT), 1)
        self.points, self.parts, self.categories = points.transpose(1, 2).float(), parts.long(), categories.long()
        self.is_allowed = torch.from_numpy(is_allowed)

    def __len__(self) -> int:
        return len(self.points)

    def read(self, index: int) -> tuple[Tensor, int, Tensor, Tensor]:
        category = int(self.categories[index])
        return self.points[index], category, self.parts[index], self.is_allowed[category]


class ShapeNetPart(Clouds):
    """The folder shapenetcore_partanno_segmentation_benchmark_v0_normal; a file is read when it is first asked for."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(split)
        self.folder, self.cache = folder, dict[int, np.ndarray]()
        lines = [line.split() for line in read_text(folder / "synsetoffset2category.txt").splitlines() if line.strip()]
        self.names = {synset: name for name, synset in lines}
        listed = json.loads(read_text(folder / "train_test_split" / f"shuffled_{split}_file_list.json"))
        self.files = [Path(entry).parts[-2:] for entry in listed]
        if unknown := {self.names.get(synset, synset) for synset, _ in self.files} - SHAPENET_PARTS.keys():
            raise UserError(f"not a category of ShapeNetPart: {', '.join(sorted(unknown))}", where=str(folder))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int, Tensor, Tensor]:
        if index not in self.cache:
            self.cache[index] = self.load(index)
        category = list(SHAPENET_PARTS).index(self.names[self.files[index][0]])
        values, is_allowed = torch.from_numpy(self.cache[index]), shapenet_parts()[category]
        return values[:, :6], category, values[:, 6].long(), is_allowed

    def load(self, index: int) -> np.ndarray:
        """Rows of the shape's file, float32 [M, 7], positions moved and scaled into the unit ball."""
        synset, name = self.files[index]
        path = self.folder / synset / f"{name}.txt"
        text = read_text(path)
        try:
            values = np.array(text.split(), np.float32).reshape(-1, 7)
        except ValueError as error:
            raise UserError("expected rows of x y z, normal x y z, part", where=str(path)) from error
        category = list(SHAPENET_PARTS).index(self.names[synset])
        if not len(values) or not shapenet_parts()[category][values[:, 6].astype(int)].all():
            raise UserError(f"a part that {self.names[synset]} does not have, or no points", where=str(path))
        values[:, :3] -= values[:, :3].mean(0)
        values[:, :3] /= np.linalg.norm(values[:, :3], axis=1).max()
        return values


def read_text(path: Path) -> str:
    """Content of a file of ShapeNetPart. Raises UserError when it is not there."""
    if not path.is_file():
        raise UserError(f"no {path.name}", where=str(path), fix="$SHAPENET_PART_DIR names the folder of ShapeNetPart")
    return path.read_text()


def shapenet_parts() -> Tensor:
    """Which parts belong to which category, [16, 50]."""
    return torch.block_diag(*(torch.ones(1, count) for count in SHAPENET_PARTS.values())).bool()


def parts_file() -> Path:
    """$PARTS_FILE, else the larger set when it was fetched, else the subset."""
    if path := os.environ.get("PARTS_FILE"):
        return Path(path)
    full = DATA / "parts-full" / "parts.npz"
    return full if full.is_file() else DATA / "parts" / "parts.npz"


def data(split: str) -> Clouds:
    """Shapes of "train", "val" or "test"; the published numbers of ShapeNetPart are on its "test"."""
    if folder := os.environ.get("SHAPENET_PART_DIR"):
        return ShapeNetPart(Path(folder), split)
    return Components(parts_file(), split)


def num_categories_and_parts() -> tuple[int, int]:
    if os.environ.get("SHAPENET_PART_DIR"):
        return len(SHAPENET_PARTS), sum(SHAPENET_PARTS.values())
    with np.load(parts_file()) as file:
        return file["parts_of_category"].shape


def model(width: float = 0.25) -> nn.Module:
    return PointNet2(*num_categories_and_parts(), width)


def reference() -> nn.Module:
    return model(width=1)


def masked_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores [B, N, P], minus infinity for parts that the shape's category does not have."""
    points, categories, _, is_allowed = batch
    return model(points, categories).float().masked_fill(~is_allowed.unsqueeze(1), -torch.inf)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(masked_scores(model, batch).flatten(0, 1), batch[2].flatten())


def shape_iou(predicted: Tensor, parts: Tensor, is_allowed: Tensor) -> float:
    """Mean IoU over the parts of the category; a part that neither [N] has counts 1 (the ShapeNetPart rule)."""
    numbers = is_allowed.nonzero()
    is_predicted, is_true = predicted == numbers, parts == numbers
    shared, either = (is_predicted & is_true).sum(1), (is_predicted | is_true).sum(1)
    return float(torch.where(either == 0, 1.0, shared / either.clamp(min=1)).mean())


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """IoU as mean over shapes and as mean over categories of their shapes' mean; accuracy of points and mean loss."""
    ious: dict[int, list[float]] = defaultdict(list)
    num_right, total_loss, num_points = 0, 0.0, 0
    for batch in loader:
        scores, (_, categories, parts, is_allowed) = masked_scores(model, batch), batch
        predicted = scores.argmax(-1)
        for category, *shape in zip(categories.tolist(), predicted, parts, is_allowed, strict=True):
            ious[category].append(shape_iou(*shape))
        num_right += int((predicted == parts).sum())
        total_loss += float(F.cross_entropy(scores.flatten(0, 1), parts.flatten(), reduction="sum"))
        num_points += parts.numel()
    by_category = [sum(values) / len(values) for values in ious.values()]
    return {
        "instance_miou": sum(map(sum, ious.values())) / sum(map(len, ious.values())),
        "class_miou": sum(by_category) / len(by_category),
        "accuracy": num_right / num_points,
        "loss": total_loss / num_points,
    }


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=4e-3, weight_decay=1e-4)
