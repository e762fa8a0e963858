"""A task that trains in a second: an MLP with dropout, GroupNorm and a head on 512 made-up samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
defaults = {"sparsity": 0.8, "groups": 3, "rounds": 2, "phase_epochs": 0.5, "finetune_epochs": 1, "batch_size": 32}


class Block(nn.Module):
    """Two linears in a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.relu(self.up(x))))


class Net(nn.Module):
    """Three blocks between a stem and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model() -> nn.Module:
    return Net()


def data(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
    x = torch.randn(512, 8, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    hits = [(model(x).argmax(1) == y).float() for x, y in loader]
    return {"accuracy": float(torch.cat(hits).mean())}


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)
