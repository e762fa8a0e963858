"""`gapfx::sparse_convolution`: a convolution that multiplies with the live values alone, forward and backward.

The signature of gapfx.ops.convolution; native kernels instead of a dense weight. What is not live is never multiplied:
NaN in the input reaches an output through live weights alone. A weight that is all live, or masked in its dense shape,
goes the dense way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gapfx.kernels import convolution as kernels
from gapfx.ops import convolution as dense
from gapfx.ops.convolution import ConvSettings, Numbers, convolve
from gapfx.ops.product import is_unseen, product


def refusal(shape: Numbers, settings: Numbers, dtype: torch.dtype) -> str:
    """Why this convolution has to stay dense; "" when it can be taken."""
    return _refusal(tuple(shape), tuple(settings), dtype)


@lru_cache(maxsize=1024)
def _refusal(shape: Numbers, settings: Numbers, dtype: torch.dtype) -> str:
    if ConvSettings.from_ints(settings).is_transposed:
        return "a transposed convolution has no sparse kernel"
    if dtype not in kernels.DTYPES:
        return f"sparse kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return kernels.refusal(shape)


def _empty_out(x: Tensor, shape: Numbers, settings: Numbers) -> Tensor:
    """The output, not yet written; channels last where x is. Raises RuntimeError where the weight does not fit x."""
    given = ConvSettings.from_ints(settings)
    if x.shape[1] != shape[1] * given.groups:
        raise RuntimeError(f"gapfx::sparse_convolution: {x.shape[1]} channels, not {shape[1] * given.groups}")
    each = zip(x.shape[2:], shape[2:], given.stride, given.padding, given.dilation, strict=True)
    sizes = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in each]
    if min(sizes) < 1:
        raise RuntimeError(f"gapfx::sparse_convolution: the kernel {list(shape[2:])} is larger than the padded input")
    return torch.empty((x.shape[0], shape[0], *sizes), dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if is_last and last is not None else torch.contiguous_format


@lru_cache(maxsize=1024)
def _geometry(x: Numbers, out: Numbers, shape: Numbers, settings: Numbers) -> tuple[kernels.Geometry, int]:
    """Of tuples, and the number of groups."""
    given = ConvSettings.from_ints(settings)
    each = (given.stride, given.padding, given.dilation)
    return kernels.geometry(x, shape, out, each, given.groups), given.groups


def _is_dense(values: Tensor, shape: Numbers) -> bool:
    return values.numel() == math.prod(shape)


def _check(x: Tensor, values: Tensor, shape: Numbers, settings: Numbers) -> None:
    reason = refusal(shape, settings, x.dtype) or ("" if x.device.type == "cpu" else f"it is on {x.device}, not a CPU")
    if reason:
        raise RuntimeError(f"gapfx::sparse_convolution: {reason}")
    if x.dtype != values.dtype:
        raise RuntimeError(f"gapfx::sparse_convolution: the input is {x.dtype}, the weight {values.dtype}")


def _forward(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers) -> Tensor:
    out = _empty_out(x, shape, settings)
    if _is_dense(values, shape):
        return out.copy_(dense.forward(x, values, bits, bias, shape, settings))
    _check(x, values, shape, settings)
    g, groups = _geometry(x.shape, out.shape, tuple(shape), tuple(settings))
    live = kernels.prepare(bits, shape, groups)
    written, bias = out.contiguous(), None if bias is None else bias.float().contiguous()
    kernels.forward(g, live, x.contiguous(), values.float().contiguous(), bias, written)
    return out if written is out else out.copy_(written)


def _backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    shape: Numbers,
    settings: Numbers,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, values and bias, an empty tensor for each that nobody needs."""
    of_x, of_values, of_bias = _empty_gradients(gradient, x, values, needs)
    if _is_dense(values, shape):
        found = dense.backward(gradient, x, values, bits, shape, settings, needs)
        return [empty.copy_(made) for empty, made in zip((of_x, of_values, of_bias), found, strict=True)]
    _check(x, values, shape, settings)
    g, groups = _geometry(x.shape, gradient.shape, tuple(shape), tuple(settings))
    live, gradient = kernels.prepare(bits, shape, groups), gradient.contiguous()
    if needs[0]:
        written = of_x.contiguous()
        kernels.of_input(g, live, gradient, values.float().contiguous(), written)
        of_x = of_x if written is of_x else of_x.copy_(written)
    if needs[1]:
        sums = torch.zeros(values.shape, dtype=torch.float32)
        kernels.of_values(g, live, x.contiguous(), gradient, sums)
        of_values = sums.to(values.dtype)
    if needs[2]:
        of_bias = gradient.sum([0, *range(2, gradient.dim())], dtype=torch.float32).to(gradient.dtype)
    return [of_x, of_values, of_bias]


def _empty_gradients(gradient: Tensor, x: Tensor, values: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    of_values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    of_bias = gradient.new_empty(gradient.shape[1])
    found = (of_x, of_values, of_bias)
    return [item if need else gradient.new_empty(0) for item, need in zip(found, needs, strict=True)]


_convolution = torch.library.custom_op("gapfx::sparse_convolution", _forward, mutates_args=())
_convolution_backward = torch.library.custom_op("gapfx::sparse_convolution_backward", _backward, mutates_args=())


@_convolution.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers) -> Tensor:
    return _empty_out(x, shape, settings)


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
    return _empty_gradients(gradient, x, values, needs)


PRODUCT = product(_convolution, _forward, _convolution_backward, _backward)


def sparse_convolution(
    x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Numbers, settings: Numbers
) -> Tensor:
    """The convolution of x, batched or not, with the weight of `shape`; autocast as torch's. See ConvSettings.

    Raises RuntimeError with the reason for what `refusal` refuses.
    """
    # Past torch's dispatcher nobody needs to know beforehand how the output lies in memory.
    way = dense.PRODUCT if _is_dense(values, shape) and is_unseen(x) else PRODUCT
    return convolve(way, x, values, bits, bias, shape, settings)
