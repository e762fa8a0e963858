"""A task with experts in a Python loop: which of them run depends on the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """Two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """Each token goes to the expert that the router scores highest."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(Expert(width) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        choice, result = self.router(x).argmax(-1), torch.zeros_like(x)
        for index in choice.unique().tolist():
            result[choice == index] = self.experts[index](x[choice == index])
        return x + result


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Experts(8, 4) for _ in range(2)), nn.Linear(8, 4))


def example() -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
