"""`gapfx::convolution`: a convolution of any kind with a compact weight, which no dense weight outlives.

As gapfx.ops.linear: the dense weight is made in the forward and again in the backward, and is not kept in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapfx.ops.autocast import autocast_like_a_product
from gapfx.ops.expand import dense_inside, packed_inside
from gapfx.ops.product import Product, product

Numbers = Sequence[int]


@dataclass(frozen=True)
class ConvSettings:
    """What torch's convolutions take beside tensors, one number a dimension. An op takes them as one list of ints."""

    stride: Numbers
    padding: Numbers
    dilation: Numbers
    output_padding: Numbers
    groups: int = 1
    is_transposed: bool = False

    def to_ints(self) -> list[int]:
        """All numbers in one list."""
        lists = (self.stride, self.padding, self.dilation, self.output_padding)
        return [*(number for numbers in lists for number in numbers), self.groups, int(self.is_transposed)]

    @staticmethod
    def from_ints(ints: Numbers) -> ConvSettings:
        """The settings of which `ints` were made."""
        size = len(ints) // 4
        stride, padding, dilation, output_padding = (ints[at * size : (at + 1) * size] for at in range(4))
        return ConvSettings(stride, padding, dilation, output_padding, ints[-2], bool(ints[-1]))

    def arguments(self) -> tuple[Any, ...]:
        """As aten's convolutions take them, after the tensors."""
        return self.stride, self.padding, self.dilation, self.is_transposed, self.output_padding, self.groups


def forward(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers) -> Tensor:
    """The code of the op."""
    weight, arguments = dense_inside(values, bits, shape), ConvSettings.from_ints(settings).arguments()
    return torch.ops.aten.convolution(x, weight, bias, *arguments)


def backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    shape: Numbers,
    settings: Numbers,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, values and bias, an empty tensor for each that nobody needs."""
    weight, arguments = dense_inside(values, bits, shape), ConvSettings.from_ints(settings).arguments()
    found = torch.ops.aten.convolution_backward(gradient, x, weight, [gradient.shape[1]], *arguments, list(needs))
    of_x, of_weight, of_bias = (gradient.new_empty(0) if item is None else item for item in found)
    return [of_x, packed_inside(of_weight, bits, values.shape) if needs[1] else of_weight, of_bias]


_convolution = torch.library.custom_op("gapfx::convolution", forward, mutates_args=())
_convolution_backward = torch.library.custom_op("gapfx::convolution_backward", backward, mutates_args=())


@_convolution.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers) -> Tensor:
    arguments = ConvSettings.from_ints(settings).arguments()
    return torch.ops.aten.convolution(x, x.new_empty(shape), bias, *arguments)


@_convolution_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    shape: Numbers,
    settings: Numbers,
    needs: Sequence[bool],
) -> list[Tensor]:
    arguments = ConvSettings.from_ints(settings).arguments()
    of_x, _, of_bias = torch.ops.aten.convolution_backward(
        gradient, x, x.new_empty(shape), [gradient.shape[1]], *arguments, [True, True, True]
    )
    found = (of_x, values.new_empty(values.shape), of_bias)
    return [item if need else gradient.new_empty(0) for item, need in zip(found, needs, strict=True)]


PRODUCT = product(_convolution, forward, _convolution_backward, backward)


def convolve(
    op: Product,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    shape: Numbers,
    settings: Numbers,
) -> Tensor:
    """What `op` gives for x, batched or not; autocast as torch's."""
    is_batched = x.dim() == len(shape)
    given = x if is_batched else x[None]
    with autocast_like_a_product(given, values, bias) as (given, values, bias):
        out = op(given, values, bits, bias, shape, settings)
    return out if is_batched else out[0]


def convolution(
    x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers
) -> Tensor:
    """The convolution of x, batched or not, with the weight of `shape`; autocast as torch's. See ConvSettings."""
    return convolve(PRODUCT, x, values, bits, bias, shape, settings)
