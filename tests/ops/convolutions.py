"""Sparse convolutions beside torch's dense ones in float64, for tests of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.ops.convolution import ConvSettings
from gapfx.ops.sparse_convolution import sparse_convolution
from tests.ops.compact import Weight

REFERENCES: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
SUMS = 3e-5  # of float32 products, as a share of the largest result


def settings_of(weight: Weight, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> ConvSettings:
    dims = weight.dense.dim() - 2
    return ConvSettings((stride,) * dims, (padding,) * dims, (dilation,) * dims, (0,) * dims, groups)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    of_y = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)  # the same in every type
    return [y.detach(), *torch.autograd.grad(y, leaves, of_y)]


def ours(weight: Weight, x: Tensor, bias: Tensor, settings: ConvSettings) -> list[Tensor]:
    x, values, bias = x.detach().requires_grad_(), weight.values.requires_grad_(), bias.clone().requires_grad_()
    y = sparse_convolution(x, values, weight.bits, bias, weight.dense.shape, settings.to_ints())
    return gradients(y, [x, values, bias])


def theirs(weight: Weight, x: Tensor, bias: Tensor, settings: ConvSettings) -> list[Tensor]:
    leaves = [item.detach().double().requires_grad_() for item in (x, weight.dense, bias)]
    y = REFERENCES[x.dim()](*leaves, settings.stride, settings.padding, settings.dilation, settings.groups)
    found = gradients(y, leaves)
    found[2] = found[2][weight.mask].view(-1, 1)
    return found


def assert_close(one: list[Tensor], other: list[Tensor], tolerance: float = SUMS) -> None:
    for mine, right in zip(one, other, strict=True):
        assert mine.shape == right.shape
        error = (mine.double() - right).abs().max().item() if right.numel() else 0.0
        assert error <= tolerance * max(1.0, right.abs().max().item() if right.numel() else 0.0)


def check(weight: Weight, x: Tensor, settings: ConvSettings, tolerance: float = SUMS) -> None:
    bias = torch.randn(weight.dense.shape[0]).to(x.dtype)
    assert_close(ours(weight, x, bias, settings), theirs(weight, x, bias, settings), tolerance)
