"""`gapfx::fixed_linear`: a linear layer at inference, with a compact weight that never changes again.

1 to 15 tokens go to the kernels of gapfx.kernels.decode, more to those of gapfx.kernels.linear. What they prepare is
made at the first call and kept on the storage of the bits. A weight with all values live is dense and takes torch's
product; so does what the kernels cannot take. There is no gradient.

Values are fp32 or bf16, or int8 with the bytes of one fp32 scale for each output behind them (`with_scales`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import decode
from gapfx.kernels import linear as kernels
from gapfx.masks import unpack
from gapfx.ops.expand import dense_inside
from gapfx.ops.product import is_unseen

ACTIVATIONS = (torch.float32, torch.bfloat16)


def with_scales(values: Tensor, scales: Tensor) -> Tensor:
    """One column: int8 values, then the bytes of the fp32 `scales`."""
    return torch.cat((values.flatten(), scales.view(torch.int8))).view(-1, 1)


def without_scales(values: Tensor, outputs: int) -> tuple[Tensor, Tensor | None]:
    """Flat values and their scales, None unless they are int8."""
    flat = values.detach().flatten()
    if flat.dtype != torch.int8:
        return flat, None
    num = flat.numel() - 4 * outputs
    return flat[:num], flat[num:].clone().view(torch.float32)


def dense_weight(values: Tensor, bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` in `dtype`, whatever its values are."""
    flat, scales = without_scales(values, shape[0])
    if scales is not None:
        counts = unpack(bits, shape).sum(1)
        flat = flat.float() * scales.repeat_interleave(counts)
    return dense_inside(flat.to(dtype).view(-1, 1), bits, shape)


@torch.library.custom_op("gapfx::fixed_linear", mutates_args=())
def _fixed_linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return _product(x, values, bits, bias, shape)


@_fixed_linear.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def fixed_linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """As F.linear, also under autocast, with the weight of `shape` [outputs, inputs] given by `values` and `bits`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    is_direct = is_unseen(x) and not (torch.is_grad_enabled() and _is_trained(x, values, bias))
    return (_product if is_direct else _fixed_linear)(x, values, bits, bias, shape)


def _is_trained(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is wanted, which the op refuses."""
    return x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)


def _product(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    tokens = x.numel() // shape[1]
    if not _can_take(x, values, shape) or not tokens:
        return F.linear(x, dense_weight(values, bits, shape, x.dtype), bias)
    rows = x.reshape(tokens, shape[1])
    if tokens <= decode.MAX_TOKENS:
        made = decode.product(rows, layout_of(values, bits, shape), bias)
    else:
        made = kernels.forward(rows, _in_fp32(values, bits, shape), kernels.index_of(bits, shape), bias)
    return made.view(*x.shape[:-1], shape[0])


def _can_take(x: Tensor, values: Tensor, shape: Sequence[int]) -> bool:
    if values.numel() == math.prod(shape) and values.dtype != torch.int8:
        return False
    on_cpu = x.device.type == values.device.type == "cpu"
    return on_cpu and x.dtype in ACTIVATIONS and not refusal(shape, values.dtype)


def refusal(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why the kernels cannot take a weight whose values have `dtype`; "" when they can."""
    return decode.refusal(shape, dtype) or kernels.refusal(shape, torch.float32)


def _in_fp32(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    flat, scales = without_scales(values, shape[0])
    if scales is None:
        return flat
    starts = layout_of(values, bits, shape).starts
    return flat.float() * scales.repeat_interleave(starts.diff())


def layout_of(values: Tensor, bits: Tensor, shape: Sequence[int]) -> decode.DecodeLayout:
    """What the kernels for few tokens read, made when there is none for these values and bits."""
    if bits.is_inference() or values.is_inference():  # have no version: nobody could tell whether they were written
        return _prepare(values, bits, shape)
    storage: Any = bits.untyped_storage()
    versions = bits._version, values._version  # pyright: ignore[reportPrivateUsage]
    key = (*versions, bits.data_ptr(), values.data_ptr(), values.dtype, tuple(shape))
    kept: tuple[object, decode.DecodeLayout, Tensor] | None = getattr(storage, "gapfx_decode", None)
    if kept is None or kept[0] != key:
        # With the values, so that no others come to be at their address.
        kept = key, _prepare(values, bits, shape), values.detach()
        storage.gapfx_decode = kept
    return kept[1]


def _prepare(values: Tensor, bits: Tensor, shape: Sequence[int]) -> decode.DecodeLayout:
    flat, scales = without_scales(values, shape[0])
    mask = unpack(bits, shape)
    if scales is not None:
        return decode.prepare(flat, mask, bits, scales=scales)
    index = kernels.index_of(bits, shape)
    # Both go through live weights row by row, so one table of columns serves few tokens and many.
    return decode.prepare(flat, mask, bits, columns=index.columns if index.block == 1 else None)
