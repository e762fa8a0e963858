"""`gapfx::linear`: a linear layer with a compact weight, which no dense weight outlives.

The dense weight is made in the forward and made again in the backward; the input, the values and the bits are kept in
between. `values` is kept by reference: ZeRO-3 takes it away after the forward and brings it back before the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gapfx.ops.autocast import autocast_like_a_product
from gapfx.ops.expand import dense_inside, packed_inside
from gapfx.ops.product import product


def forward(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The code of the op."""
    return torch.ops.aten.linear(x, dense_inside(values, bits, shape), bias)


def backward(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, values and bias, an empty tensor for each that nobody needs."""
    rows, inputs = gradient.reshape(-1, shape[0]).contiguous(), x.reshape(-1, shape[1])
    none = gradient.new_empty(0)
    return [
        (rows @ dense_inside(values, bits, shape)).view(x.shape) if needs[0] else none,
        packed_inside(rows.t() @ inputs, bits, values.shape) if needs[1] else none.clone(),
        rows.sum(0) if needs[2] else none.clone(),
    ]


_linear = torch.library.custom_op("gapfx::linear", forward, mutates_args=())
_linear_backward = torch.library.custom_op("gapfx::linear_backward", backward, mutates_args=())


@_linear.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_linear_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    sizes = (x.shape, values.shape, (shape[0],))
    return [gradient.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True)]


PRODUCT = product(_linear, forward, _linear_backward, backward)


def linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """As F.linear, also under autocast, with the weight of `shape` [outputs, inputs] given by `values` and `bits`."""
    with autocast_like_a_product(x, values, bias) as (given, live, offset):
        return PRODUCT(given, live, bits, offset, shape)
