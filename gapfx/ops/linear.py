"""`gapfx::linear`: a linear layer with a compact weight, which no dense weight outlives.

The dense weight is made in the forward and made again in the backward; the input, the values and the bits are kept in
between. `values` is kept by reference: ZeRO-3 takes it away after the forward and brings it back before the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapfx.ops.autocast import autocast_like_a_product
from gapfx.ops.expand import dense_of, packed_of


@torch.library.custom_op("gapfx::linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return torch.ops.aten.linear(x, dense_of(values, bits, shape), bias)


@torch.library.custom_op("gapfx::linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, values and bias, an empty tensor for each that nobody needs."""
    rows, inputs = gradient.reshape(-1, shape[0]), x.reshape(-1, shape[1])
    none = gradient.new_empty(0)
    return [
        (rows @ dense_of(values, bits, shape)).view(x.shape) if needs[0] else none,
        packed_of(rows.t() @ inputs, bits, values.shape) if needs[1] else none.clone(),
        rows.sum(0) if needs[2] else none.clone(),
    ]


@_linear.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_linear_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    sizes = (x.shape, values.shape, (shape[0],))
    return [gradient.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True)]


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the backward needs of the forward; also of a sparse product."""
    x, values, bits, _, ctx.shape = inputs
    ctx.save_for_backward(x, values, bits)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, bits = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = _linear_backward(gradient.contiguous(), x, values, bits, ctx.shape, needs)
    of_x, of_values, of_bias = (item if need else None for item, need in zip(found, needs, strict=True))
    return of_x, of_values, None, of_bias, None


_linear.register_autograd(_backward, setup_context=keep)


def linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """As F.linear, also under autocast, with the weight of `shape` [outputs, inputs] given by `values` and `bits`."""
    with autocast_like_a_product(x, values, bias) as (given, live, offset):
        return _linear(given, live, bits, offset, shape)
