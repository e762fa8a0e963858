"""`gapfx::embedding`: a lookup in a compact table, which no dense table outlives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapfx.ops.expand import dense_inside, packed_inside


@torch.library.custom_op("gapfx::embedding", mutates_args=())
def embedding(
    indices: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], padding: int = -1, scale: bool = False
) -> Tensor:
    """Rows of the table of `shape`. No gradient reaches row `padding`; `scale` divides by how often a row is used."""
    return torch.ops.aten.embedding(dense_inside(values, bits, shape), indices)


@torch.library.custom_op("gapfx::embedding_backward", mutates_args=())
def _embedding_backward(
    gradient: Tensor,
    indices: Tensor,
    values: Tensor,
    bits: Tensor,
    shape: Sequence[int],
    padding: int,
    scale: bool,
) -> Tensor:
    dense = torch.ops.aten.embedding_dense_backward(gradient, indices, shape[0], padding, scale)
    return packed_inside(dense, bits, values.shape)


@embedding.register_fake
def _(
    indices: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int], padding: int = -1, scale: bool = False
) -> Tensor:
    return values.new_empty(*indices.shape, shape[1])


@_embedding_backward.register_fake
def _(gradient: Tensor, indices: Tensor, values: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, values, bits, ctx.shape, ctx.padding, ctx.scale = inputs
    # Values for their shape alone: ZeRO-3 may have taken their content away.
    ctx.save_for_backward(indices, values, bits)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_values = _embedding_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.shape, ctx.padding, ctx.scale)
    return None, of_values, None, None, None, None


embedding.register_autograd(_backward, setup_context=_keep)
