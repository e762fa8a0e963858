"""A task that trains a ScriptModule between two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

defaults = {"sparsity": 0.5, "groups": 2, "rounds": 1, "phase_epochs": 0.5, "finetune_epochs": 0.5, "batch_size": 16}


def model() -> nn.Module:
    body = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    return nn.Sequential(nn.Linear(6, 8), body, nn.Linear(8, 4))


def data(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed({"train": 0, "val": 1}[split])
    x = torch.randn(64, 6, generator=generator)
    return TensorDataset(x, x[:, :4].cumsum(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()
