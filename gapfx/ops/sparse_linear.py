"""`gapfx::sparse_linear`: as `gapfx::linear`, with kernels that read live values alone, forward and backward.

Results are those of the dense product up to rounding in fp32, the same at each run. They differ where a dropped weight
meets NaN or infinity: zero times infinity is NaN in a dense product, and here a dropped weight takes part in nothing.
What the kernels cannot take (no library, another device or dtype, a weight that is masked or all live) is computed by
`gapfx::linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gapfx.kernels import linear as kernels
from gapfx.ops import linear as dense
from gapfx.ops.autocast import autocast_like_a_product
from gapfx.ops.product import product

refusal = kernels.refusal


def _can_take(values: Tensor, shape: Sequence[int], *others: Tensor | None) -> bool:
    if values.numel() == math.prod(shape) or values.device.type != "cpu":
        return False
    same = all(t is None or (t.device == values.device and t.dtype == values.dtype) for t in others)
    return same and not kernels.refusal(shape, values.dtype)


def _forward(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if not _can_take(values, shape, x, bias):
        return dense.forward(x, values, bits, bias, shape)
    rows = kernels.forward(x.reshape(-1, shape[1]), values, kernels.index_of(bits, shape), bias)
    return rows.view(*x.shape[:-1], shape[0])


def _backward(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, values and bias, an empty tensor for each that nobody needs."""
    if not _can_take(values, shape, x, gradient):
        return dense.backward(gradient, x, values, bits, shape, needs)
    rows, inputs = gradient.reshape(-1, shape[0]).contiguous(), x.reshape(-1, shape[1])
    of_x, of_values = None, None
    if needs[0] or needs[1]:
        index = kernels.index_of(bits, shape)
        of_x, of_values = kernels.backward(rows, inputs, values, index, needs_x=needs[0], needs_values=needs[1])
    return [
        gradient.new_empty(0) if of_x is None else of_x.view(x.shape),
        gradient.new_empty(0) if of_values is None else of_values,
        rows.sum(0) if needs[2] else gradient.new_empty(0),
    ]


_sparse_linear = torch.library.custom_op("gapfx::sparse_linear", _forward, mutates_args=())
_sparse_linear_backward = torch.library.custom_op("gapfx::sparse_linear_backward", _backward, mutates_args=())


@_sparse_linear.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_sparse_linear_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    sizes = (x.shape, values.shape, (shape[0],))
    return [gradient.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True)]


PRODUCT = product(_sparse_linear, _forward, _sparse_linear_backward, _backward)


def sparse_linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """As F.linear, also under autocast, with the weight of `shape` [outputs, inputs] given by `values` and `bits`."""
    with autocast_like_a_product(x, values, bias) as (given, live, offset):
        return PRODUCT(given, live, bits, offset, shape)
