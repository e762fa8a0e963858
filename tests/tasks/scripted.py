"""A task with a ScriptModule between two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def model() -> nn.Module:
    body = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm([2, 8])))
    return nn.Sequential(nn.Linear(6, 8), body, nn.Linear(8, 4))


def example() -> Tensor:
    return torch.randn(3, 2, 6)
