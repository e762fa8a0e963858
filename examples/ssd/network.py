"""Networks of SSD: a ResNet, smaller maps of features behind it, and two heads on each map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssd.boxes import LEVELS


class Residual(nn.Module):
    """A layer beside a shortcut: the layer's last norm, then the sum, then ReLU."""

    def __init__(self, layer: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + self.shortcut(x))


def conv(num_in: int, num_out: int, kernel: int, stride: int = 1, padding: int = -1) -> nn.Sequential:
    """A convolution and BatchNorm; without `padding` a stride of 1 keeps the size."""
    padding = kernel // 2 if padding < 0 else padding
    bare = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
    return nn.Sequential(bare, nn.BatchNorm2d(num_out))


def group_conv(num_in: int, num_out: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution and GroupNorm, whose result does not depend on how a batch is split over ranks."""
    bare = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(bare, nn.GroupNorm(num_out // 8, num_out))


def basic(num_in: int, num_out: int, stride: int) -> Residual:
    """The block of ResNet-18, with GroupNorm."""
    layer = nn.Sequential(*group_conv(num_in, num_out, stride), nn.ReLU(), *group_conv(num_out, num_out))
    is_same = stride == 1 and num_in == num_out
    return Residual(layer, nn.Identity() if is_same else nn.Conv2d(num_in, num_out, 1, stride, bias=False))


def bottleneck(num_in: int, num_out: int, stride: int) -> Residual:
    """The block of ResNet-50 v1.5, with its stride in the 3 x 3 convolution."""
    width = num_out // 4
    relu = nn.ReLU()
    parts = (*conv(num_in, width, 1), relu, *conv(width, width, 3, stride), relu, *conv(width, num_out, 1))
    is_same = stride == 1 and num_in == num_out
    return Residual(nn.Sequential(*parts), nn.Identity() if is_same else conv(num_in, num_out, 1, stride))


def extra(num_in: int, width: int, num_out: int, stride: int) -> nn.Sequential:
    """A narrow and a wide convolution to the next, smaller map of features."""
    wide = conv(width, num_out, 3, stride, padding=1 if stride == 2 else 0)
    return nn.Sequential(*conv(num_in, width, 1), nn.ReLU(), *wide, nn.ReLU())


class SSD(nn.Module):
    """Images [B, 3, S, S] -> scores [B, A, 1 + C] of background and classes, offsets [B, A, 4] of the default boxes.

    The backbone gives the first map of features, each of `extras` the next one from the last.
    """

    def __init__(
        self, backbone: nn.Module, extras: Sequence[nn.Module], widths: Sequence[int], num_classes: int, side: int
    ) -> None:
        super().__init__()
        self.num_scores = 1 + num_classes
        self.backbone = backbone
        self.extras = nn.ModuleList(extras)
        counts = [level.num_shapes for level in LEVELS[side]]
        pairs = list(zip(widths, counts, strict=True))
        self.score_heads = nn.ModuleList(nn.Conv2d(w, count * self.num_scores, 3, padding=1) for w, count in pairs)
        self.offset_heads = nn.ModuleList(nn.Conv2d(w, count * 4, 3, padding=1) for w, count in pairs)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.backbone(images)]
        for layer in self.extras:
            maps.append(layer(maps[-1]))
        scores = [by_box(head(x), self.num_scores) for head, x in zip(self.score_heads, maps, strict=True)]
        offsets = [by_box(head(x), 4) for head, x in zip(self.offset_heads, maps, strict=True)]
        return torch.cat(scores, 1), torch.cat(offsets, 1)


def by_box(x: Tensor, num_values: int) -> Tensor:
    """What a head says, in the order of the default boxes: [B, shapes x V, H, W] to [B, H x W x shapes, V]."""
    return rearrange(x, "b (shape v) h w -> b (h w shape) v", v=num_values)


def small_ssd(num_classes: int) -> SSD:
    """A small SSD for images of 128 x 128."""
    stem = nn.Sequential(*group_conv(3, 16, stride=2), nn.ReLU())
    backbone = nn.Sequential(stem, basic(16, 32, 2), basic(32, 64, 2), basic(64, 64, 1))
    return SSD(backbone, (basic(64, 96, 2), basic(96, 96, 2)), (64, 96, 96), num_classes, 128)


def ssd300(num_classes: int) -> SSD:
    """SSD300 on the first three stages of ResNet-50; the last of them keeps its 38 x 38 cells."""
    stem = nn.Sequential(*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    layers = [stem]
    for num_in, num_out, count, stride in ((64, 256, 3, 1), (256, 512, 4, 2), (512, 1024, 6, 1)):
        rest = (bottleneck(num_out, num_out, 1) for _ in range(count - 1))
        layers.append(nn.Sequential(bottleneck(num_in, num_out, stride), *rest))
    sizes = ((1024, 256, 512, 2), (512, 256, 512, 2), (512, 128, 256, 2), (256, 128, 256, 1), (256, 128, 256, 1))
    return SSD(
        nn.Sequential(*layers), [extra(*size) for size in sizes], (1024, 512, 512, 256, 256, 256), num_classes, 300
    )
