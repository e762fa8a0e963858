"""Models that the measurements of steps and of inference share: a GPT, ViT-Tiny and ResNet-18, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench_memory import VOCABULARY, Gpt, Layer, loss_of

CLASSES = 10
WIDTH = 768


class VitTiny(nn.Module):
    """The sizes of ViT-Tiny with patches of 16: 12 layers of width 192, 197 tokens of an image of 224 x 224."""

    def __init__(self, layers: int = 12, width: int = 192) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 16, 16), nn.Linear(width, CLASSES)
        self.places = nn.Parameter(torch.zeros(197, width))
        self.blocks = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every class."""
        x = F.pad(self.patches(x).flatten(2).transpose(1, 2), (0, 0, 1, 0)) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Residual(nn.Module):
    """Two convolutions of 3 x 3 and a way around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width where the channels change."""
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.around(x))


class ResNet(nn.Module):
    """The sizes of ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.blocks = nn.ModuleList(Residual(*size) for size in sizes)
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every class."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the classes."""
    return F.cross_entropy(model(batch[0]), batch[1])


def made(name: str, batch: int, length: int, layers: int) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]:
    """A model, a batch for it, and its loss."""
    torch.manual_seed(0)
    if name == "gpt":
        return Gpt(layers, WIDTH, length), torch.randint(VOCABULARY, (batch, length + 1)), loss_of
    images = (torch.randn(batch, 3, 224, 224), torch.randint(CLASSES, (batch,)))
    return VitTiny(layers) if name == "vit" else ResNet(), images, classify
