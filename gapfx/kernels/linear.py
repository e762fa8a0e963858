"""Products with a sparse weight [outputs, inputs] that read live values alone: the kernels of linear.cpp with tensors.

What a mask alone decides, the `Index`, is made once and kept on the storage of its bits, for as long as these are not
written in place. It takes 2 bytes a live weight (half a byte where four consecutive outputs share their inputs) and the
starts of rows in tiles of inputs, and of columns in tiles of outputs: 4 bytes for about 20 or 30 live weights each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gapfx.kernels import native
from gapfx.kernels.preparation import preparing

DTYPES = (torch.float32, torch.bfloat16)
MAX_SIDE = 1 << 16
MAX_NUMEL = 2**31 - 1
BLOCK = 4
SPARE = 16
# Inputs of a tile: the panel of 64 tokens of a small one stays in the first cache, but a row needs work in each tile,
# so that few live weights take a larger one. Blocks read a panel a quarter as often and live on the second cache.
TILES: tuple[tuple[int, int], ...] = ((96, 24), (192, 12), (384, 0))  # inputs, and the least live ones of a row
BLOCK_TILE = 768


class _Pattern(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "block", "tiles", "tile", "tile_step", "next")),
        *((name, ctypes.c_void_p) for name in ("columns", "starts")),
    ]


@dataclass(frozen=True)
class Index:
    """Where the live weights are, for the kernels; `block` consecutive outputs share their inputs."""

    shape: tuple[int, int]
    block: int
    tile: int
    turned_tile: int
    columns: Tensor
    starts: Tensor
    turned_starts: Tensor

    @property
    def num_live(self) -> int:
        """Live weights, all outputs of a block counted."""
        return (self.columns.numel() - SPARE) * self.block

    @property
    def nbytes(self) -> int:
        """What it takes for as long as the mask lives."""
        return self.columns.nbytes + self.starts.nbytes + self.turned_starts.nbytes

    def pattern(self) -> _Pattern:
        """As the kernels read it."""
        outputs, inputs = self.shape
        rows = outputs // self.block
        sizes = (rows, inputs, self.block, -(-inputs // self.tile), self.tile, rows, rows)
        return _Pattern(*sizes, self.columns.data_ptr(), self.starts.data_ptr())


def refusal(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why the kernels cannot take a weight; "" when they can."""
    if native.library() is None:
        return f"no native kernels: {native.missing_reason()}"
    if len(shape) != 2:
        return f"a weight of {len(shape)} dimensions"
    if max(shape) > MAX_SIDE:
        return f"more than {MAX_SIDE} inputs or outputs"
    if math.prod(shape) > MAX_NUMEL:
        return "the weight has 2^31 elements or more"
    return "" if dtype in DTYPES else f"{str(dtype).removeprefix('torch.')}: the kernels compute in fp32 and bf16"


def index_of(bits: Tensor, shape: Sequence[int]) -> Index:
    """The index of packed `bits` for a weight of `shape`, made when there is none or the bits have changed since."""
    if bits.is_inference():  # has no version: nobody could tell whether it was written
        return _prepare(bits, (shape[0], shape[1]))
    storage: Any = bits.untyped_storage()
    key = (bits._version, bits.storage_offset(), tuple(shape))  # pyright: ignore[reportPrivateUsage]
    kept: tuple[object, Index] | None = getattr(storage, "gapfx_index", None)
    if kept is None or kept[0] != key:
        kept = key, _prepare(bits, (shape[0], shape[1]))
        storage.gapfx_index = kept
    return kept[1]


@preparing()
def _prepare(bits: Tensor, shape: tuple[int, int]) -> Index:
    outputs, inputs = shape
    bits = bits.contiguous()
    num = native.count(bits, outputs * inputs)
    block = BLOCK if _library().gapfx_linear_has_blocks(bits.data_ptr(), outputs, inputs) else 1
    rows, entries = outputs // block, num // block
    wanted = next(size for size, least in TILES if entries * size >= least * rows * inputs)
    tile = _even(inputs, wanted if block == 1 else BLOCK_TILE)
    turned_tile = _even(rows, wanted // block)
    columns = torch.empty(entries + SPARE, dtype=torch.uint16)
    starts = torch.empty((-(-inputs // tile) + 1, rows), dtype=torch.int32)
    turned_starts = torch.empty((-(-rows // turned_tile), inputs + 1), dtype=torch.int32)
    made = (columns.data_ptr(), starts.data_ptr(), turned_starts.data_ptr())
    _library().gapfx_linear_prepare(bits.data_ptr(), outputs, inputs, block, tile, turned_tile, *made)
    return Index(shape, block, tile, turned_tile, columns, starts, turned_starts)


def _even(columns: int, wanted: int) -> int:
    """Columns of a tile, about as many as wanted and about the same for all tiles."""
    return -(-columns // max(1, round(columns / wanted)))


def forward(x: Tensor, values: Tensor, index: Index, bias: Tensor | None) -> Tensor:
    """Rows of x [tokens, inputs] @ weight.T + bias, in the dtype of x."""
    native.check_size("values", values, index.num_live)
    native.check_size("bias", bias, index.shape[0])
    x = x.contiguous()
    y = x.new_empty(x.shape[0], index.shape[0])
    live, offset = _fp32(values), None if bias is None else _fp32(bias)
    _library().gapfx_linear_forward(
        ctypes.byref(index.pattern()),
        live.data_ptr(),
        None if offset is None else offset.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        x.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return y


def backward(
    gradient: Tensor, x: Tensor, values: Tensor, index: Index, *, needs_x: bool, needs_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the live values from that of the product [tokens, outputs], each where it is needed."""
    native.check_size("values", values, index.num_live)
    gradient, x, live = gradient.contiguous(), x.contiguous(), _fp32(values)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_values = torch.zeros(values.shape) if needs_values else None
    _library().gapfx_linear_backward(
        ctypes.byref(index.pattern()),
        index.turned_starts.data_ptr(),
        index.turned_tile,
        live.data_ptr(),
        gradient.data_ptr(),
        x.data_ptr(),
        None if grad_x is None else grad_x.data_ptr(),
        None if grad_values is None else grad_values.data_ptr(),
        x.shape[0],
        x.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return grad_x, None if grad_values is None else grad_values.to(values.dtype)


def _fp32(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).contiguous()


@cache
def _library() -> ctypes.CDLL:
    found = native.needed()
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.gapfx_linear_has_blocks.argtypes = [pointer, size, size]
    found.gapfx_linear_prepare.argtypes = [pointer, *[size] * 5, *[pointer] * 3]
    found.gapfx_linear_forward.argtypes = [*[pointer] * 5, size, number, number]
    found.gapfx_linear_backward.argtypes = [pointer, pointer, size, *[pointer] * 5, size, number, number]
    for name in ("prepare", "forward", "backward"):
        getattr(found, f"gapfx_linear_{name}").restype = None
    return found
