"""`gapfx::expand` and `gapfx::gather`: a compact weight (its live values) to its dense shape, and back.

`values` holds the weights whose bit is 1, in flat row-major order, in any shape with that many elements; `bits` are
packed as in gapfx.masks. Each op is the other's derivative, so that the gradient of compact values is compact.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gapfx.kernels import native, setting
from gapfx.masks import unpack
from gapfx.ops.mask import mask, masked


def expanded(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense tensor of `shape`: the values where the bit is 1, exact 0 elsewhere."""
    kernels = _kernels_for(values)
    if kernels is not None:
        dense = values.new_empty(shape)
        kernels.expand(values, bits, dense)
        return dense
    return values.new_zeros(shape).masked_scatter_(unpack(bits, shape), values)


def gathered(dense: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of `dense` whose bit is 1, as a tensor of `shape` (as many elements as there are such bits)."""
    dense = dense.contiguous()
    kernels = _kernels_for(dense)
    if kernels is not None:
        values = dense.new_empty(shape)
        kernels.gather(dense, bits, values)
        return values
    return dense.masked_select(unpack(bits, dense.shape)).view(shape)


expand = torch.library.custom_op("gapfx::expand", expanded, mutates_args=())
gather = torch.library.custom_op("gapfx::gather", gathered, mutates_args=())


def _kernels_for(tensor: Tensor) -> ModuleType | None:
    """What serves where the tensor is: Triton on CUDA, native code on the CPU; None leaves it to torch."""
    is_for_triton = tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    if is_for_triton and tensor.element_size() <= 8 and _has_triton():
        from gapfx.kernels import cuda  # only now: it loads Triton

        return cuda
    return native if native.can_take(tensor) else None


@cache
def _has_triton() -> bool:
    return not setting.is_off() and importlib.util.find_spec("triton") is not None


@expand.register_fake
def _(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@gather.register_fake
def _(dense: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    return dense.new_empty(shape)


def _keep_shape(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int]], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape


def _gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (bits,) = ctx.saved_tensors
    return gather(gradient, bits, ctx.shape), None, None


def _expand_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (bits,) = ctx.saved_tensors
    return expand(gradient, bits, ctx.shape), None, None


expand.register_autograd(_gather_gradient, setup_context=_keep_shape)
gather.register_autograd(_expand_gradient, setup_context=_keep_shape)


def dense_of(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight; a view of the values, without a copy, when all of them are live.

    Values that have the dense shape already are masked: so one graph serves both forms of a weight.
    """
    return _in_shape(values, bits, shape, mask, expand)


def dense_inside(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """As `dense_of`, without a gradient, past torch's dispatcher: inside of an op nobody looks on."""
    return _in_shape(values, bits, shape, masked, expanded)


def packed_of(dense: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The live values of `dense` in `shape`; a view of it, without a copy, when all of them are live.

    In the dense shape, zeros stand where the mask drops.
    """
    return _in_shape(dense, bits, shape, mask, gather)


def packed_inside(dense: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """As `packed_of`, inside of an op."""
    return _in_shape(dense, bits, shape, masked, gathered)


def _in_shape(
    tensor: Tensor, bits: Tensor, shape: Sequence[int], mask: Callable[..., Tensor], change: Callable[..., Tensor]
) -> Tensor:
    if tensor.shape == tuple(shape):
        return mask(tensor, bits)
    if tensor.numel() == math.prod(shape):
        return tensor.reshape(shape)
    return change(tensor, bits, shape)
