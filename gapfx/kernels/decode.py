"""Products of 1 to 15 tokens with a fixed sparse weight [outputs, inputs]: the kernels of decode.cpp with tensors.

Results are those of the dense product up to rounding: in fp32 for values in fp32, of weights to bf16 and tokens to 16
bits for values in bf16; for values in int8 the numbers of each token are rounded to 127 levels a sign and products are
summed exactly. Where a dropped weight meets NaN or infinity the result may be NaN or not: a kernel that goes by columns
does not see it, one that goes by masks does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import native

Values = Literal["fp32", "bf16", "int8"]
MAX_TOKENS = 15
MAX_INPUTS = 1 << 16
SPARE = 64
WORD = 64
TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Tokens from which live columns by number beat masks, by live share: (share up to, tokens). Measured on stacks of
# layers that are larger than the caches, with tools/bench_decode.py, on AVX-512: without it nothing goes by masks.
BY_NUMBER_FROM: dict[torch.dtype, tuple[tuple[float, int], ...]] = {
    torch.float32: ((0.15, 1), (0.3, 2), (1.0, 16)),
    torch.bfloat16: ((0.07, 1), (0.12, 3), (0.25, 6), (1.0, 16)),
    torch.int8: ((1.0, 16),),
}


class _Layout(ctypes.Structure):
    _fields_ = [
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("words", "columns", "starts", "values", "scales", "totals")),
        ("type", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class DecodeLayout:
    """A fixed weight as the kernels read it: live values row after row, and where they stand.

    Places are mask `words`, a whole number for each row, or the numbers of live `columns`, or both; calls of
    `by_number_from` tokens and more go by columns. `scales` [outputs] are for int8 alone: what one unit of a row's
    values stands for.
    """

    shape: tuple[int, int]
    values: Tensor
    starts: Tensor
    words: Tensor | None = None
    columns: Tensor | None = None
    scales: Tensor | None = None
    totals: Tensor | None = None
    by_number_from: int = 1
    address: ctypes.Structure = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Gather the addresses, which do not change between calls."""
        tensors = (self.words, self.columns, self.starts, self.values, self.scales, self.totals)
        addresses = (None if t is None else t.data_ptr() for t in tensors)
        object.__setattr__(self, "address", _Layout(*self.shape, *addresses, TYPES[self.values.dtype]))

    @property
    def nbytes(self) -> int:
        """What it takes in memory, the values included."""
        tensors = (self.values, self.starts, self.words, self.columns, self.scales, self.totals)
        return sum(t.nbytes for t in tensors if t is not None)


def refusal(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why the kernels cannot take a weight whose values have `dtype`; "" when they can."""
    if native.library() is None:
        return f"no native kernels: {native.missing_reason()}"
    if len(shape) != 2 or min(shape) < 1:
        return f"a weight of shape {list(shape)}"
    if shape[1] > MAX_INPUTS:
        return f"more than {MAX_INPUTS} inputs"
    return "" if dtype in TYPES else f"{str(dtype).removeprefix('torch.')}: values are fp32, bf16 or int8"


def prepare(
    values: Tensor,
    mask: Tensor,
    bits: Tensor,
    *,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
    by_number_from: int = 0,
) -> DecodeLayout:
    """The layout of a weight from its live values (flat row-major order), bool mask (True = kept) and the same packed.

    Values are fp32, bf16 or int8 (with `scales` [outputs], see `quantised`) and are not copied when their storage has
    room for `SPARE` more behind them. `columns`, uint16 in the same order, are taken where somebody has them already.
    `by_number_from` overrules the measured number of tokens, as 16 does for masks alone.
    """
    outputs, inputs = mask.shape
    counts = mask.sum(1)
    starts = F.pad(counts.cumsum(0), (1, 0))
    native.check_size("values", values, int(starts[-1]))
    share, totals = int(starts[-1]) / (outputs * inputs), None
    first = by_number_from or _by_number_from(values.dtype, share)
    if values.dtype == torch.int8:
        totals = torch.zeros((outputs, inputs), dtype=torch.int32)
        totals = totals.masked_scatter_(mask, values.flatten().to(torch.int32)).sum(1, dtype=torch.int32)
    if columns is None and first <= MAX_TOKENS:
        columns = mask.nonzero()[:, 1].to(torch.uint16)
    words = _words(mask, bits) if first > 1 or columns is None else None
    live = with_spare(values.flatten())
    return DecodeLayout((outputs, inputs), live, starts, words, columns, scales, totals, first)


def _by_number_from(dtype: torch.dtype, share: float) -> int:
    if not native.needed().gapfx_decode_has_masked(TYPES[dtype]):
        return 1
    return next(tokens for up_to, tokens in BY_NUMBER_FROM[dtype] if share <= up_to)


def with_spare(values: Tensor) -> Tensor:
    """The same flat values, in a storage with room for `SPARE` more behind them."""
    end = (values.storage_offset() + values.numel() + SPARE) * values.element_size()
    if values.is_contiguous() and values.untyped_storage().nbytes() >= end:
        return values
    roomy = values.new_zeros(values.numel() + SPARE)
    roomy[: values.numel()] = values
    return roomy[: values.numel()]


def quantised(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values as int8 and the scale of each output, fp32: the largest magnitude of a row becomes 127.

    A row with NaN or infinity has a scale that is NaN, and so are its outputs.
    """
    rows = torch.arange(len(mask)).repeat_interleave(mask.sum(1))
    flat = values.detach().flatten().float()
    top = torch.zeros(mask.shape).masked_scatter_(mask, flat.abs()).amax(1)
    scales = torch.where(top > 0, top / 127, 1.0).masked_fill_(~top.isfinite(), torch.nan)
    return (flat / scales[rows]).nan_to_num(0).round().clamp(-127, 127).to(torch.int8), scales


def product(x: Tensor, layout: DecodeLayout, bias: Tensor | None) -> Tensor:
    """X [tokens, inputs] @ weight.T + bias for 1 to 15 tokens, all fp32 or all bf16, in the dtype of x."""
    native.check_size("bias", bias, layout.shape[0])
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    tokens = x.shape[0]
    y = x.new_empty(tokens, layout.shape[0])
    status: int = _function()(
        ctypes.byref(layout.address),
        x.data_ptr(),
        tokens,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.dtype == torch.bfloat16,
        tokens >= layout.by_number_from,
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(f"{tokens} tokens: the kernels take 1 to {MAX_TOKENS}")
    return y


def _words(mask: Tensor, bits: Tensor) -> Tensor:
    """Packed bits with each row on a word of its own; the bits themselves where rows fill whole words."""
    inputs = mask.shape[1]
    if inputs % WORD == 0 and bits.is_contiguous() and bits.data_ptr() % 8 == 0:
        return bits
    each = F.pad(mask, (0, -inputs % WORD)).view(-1, 8).to(torch.uint8)
    return (each << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


@cache
def _function() -> ctypes._NamedFuncPointer:  # pyright: ignore[reportPrivateUsage]
    function = native.needed().gapfx_decode
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, pointer, number, pointer, pointer, number, number, number]
    return function
