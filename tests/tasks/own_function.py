"""A task whose weight reaches its product inside a custom autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Product(torch.autograd.Function):
    """x @ w.T with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class Layer(nn.Module):
    """A residual layer on that Function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(width, width) / 4), nn.Parameter(torch.zeros(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(Product.apply(x, self.weight) + self.shift)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), Layer(16), Layer(16), nn.Linear(16, 4))


def example() -> Tensor:
    return torch.randn(4, 8)
