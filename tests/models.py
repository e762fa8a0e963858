"""Models in plain torch that tests share; small unless a width is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.capture import Capture, capture


def captured(model: nn.Module, *inputs: Tensor) -> Capture:
    """The capture of one forward."""
    return capture(model, lambda module: module(*inputs))


class Bottleneck(nn.Module):
    """ResNet v1.5 block with expansion 4."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += identity
        return self.relu(x)


class ResNet(nn.Module):
    """conv1, bn1, layer1..layer4 of bottlenecks, fc."""

    def __init__(self, depths: tuple[int, ...], width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for index, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for block in range(depth):
                stride = 2 if block == 0 and index > 0 else 1
                blocks.append(Bottleneck(inputs, width * 2**index, stride))
                inputs = 4 * width * 2**index
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.num_stages = len(depths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(self.num_stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet50(width: int = 4) -> nn.Module:
    """ResNet-50 at a small width (64 is the real one)."""
    return ResNet((3, 4, 6, 3), width)


def resnet_input() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, stride=2)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def transformer(layers: int = 6) -> nn.Transformer:
    return nn.Transformer(8, 2, layers, layers, 16, dropout=0.1, batch_first=True)


def transformer_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 4, 8)


class Tagger(nn.Module):
    """Embedding, LSTM, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(tokens))[0])


class Attention(nn.Module):
    """One attention layer with separate widths for keys and values, so that it holds q, k and v weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        return self.cross(x, memory, memory)[0]


class LanguageModel(nn.Module):
    """Embedding tied to the output head, positions, two blocks."""

    def __init__(self, is_tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 8)
        self.positions = nn.Parameter(torch.zeros(1, 6, 8))
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)
        if is_tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """A layer of experts: each token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero(as_tuple=True)
            result[rows] = expert(x[rows])
        return x + result


class TiedPair(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6) % 11


# name -> (model, inputs): one for each way in which an owner uses its weights.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "mlp": (mlp, lambda: (torch.randn(4, 6),)),
    "cnn": (cnn, lambda: (torch.randn(2, 3, 8, 8),)),
    "transformer": (lambda: transformer(2), transformer_inputs),
    "lstm": (Tagger, lambda: (tokens(),)),
    "attention": (Attention, lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 6))),
    "tied": (TiedPair, lambda: (torch.randn(4, 6),)),
    "language-model": (LanguageModel, lambda: (tokens(),)),
    "experts": (lambda: nn.Sequential(Experts(), Experts()), lambda: (torch.randn(10, 8),)),
}
