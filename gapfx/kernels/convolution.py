"""Native convolution with a sparse weight: forward, gradient of the input, gradient of the live values."""

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

Numbers = Sequence[int]
DTYPES = (torch.float32, torch.bfloat16)
DIMS = 3
# Columns of a tile: from 24 KB of a panel of lanes, for the nearest cache, to 96 KB where rows have few live weights.
NARROW, WIDE, LIVE_IN_A_ROW = 96, 384, 32
MAX_TAPS = 1 << 16  # a column of the transposed weight counts from its tile, which has all taps of a channel
_MOST = 2**31 - 1
_Each = ctypes.c_int64 * DIMS


class Geometry(ctypes.Structure):
    """A convolution in three dimensions, of which the first may be missing (size 1)."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "groups", "inputs", "outputs")),
        *((name, _Each) for name in ("input", "output", "kernel", "stride", "padding", "dilation")),
    )


class _Live(ctypes.Structure):
    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tiles", "width", "is_blocked")),
    )


@dataclass(frozen=True)
class Live:
    """Where the live weights are, in tiles of `width` columns: two bytes a weight, four a row and tile."""

    starts: Tensor
    columns: Tensor
    tiles: int
    width: int
    is_blocked: bool

    def native(self) -> _Live:
        """As the kernels take it."""
        return _Live(self.starts.data_ptr(), self.columns.data_ptr(), self.tiles, self.width, int(self.is_blocked))


def geometry(x: Numbers, shape: Numbers, out: Numbers, settings: Sequence[Numbers], groups: int) -> Geometry:
    """Of input, weight and output shapes; `settings` are stride, padding and dilation."""
    stride, padding, dilation = settings
    each = (_three(x[2:], 1), _three(out[2:], 1), _three(shape[2:], 1))
    return Geometry(x[0], groups, x[1], shape[0], *each, _three(stride, 1), _three(padding, 0), _three(dilation, 1))


def prepare(bits: Tensor, shape: Numbers, groups: int) -> Live:
    """The live weights of packed bits; kept on the storage of the bits until they change."""
    storage: Any = bits.untyped_storage()
    kept: dict[Any, tuple[int, Live]] = storage.__dict__.setdefault("gapfx_convolutions", {})
    key, version = (bits.storage_offset(), tuple(shape), groups), -1 if bits.is_inference() else bits._version
    if version < 0 or key not in kept or kept[key][0] != version:
        kept[key] = version, _prepare(bits, shape, groups)
    return kept[key][1]


def forward(g: Geometry, live: Live, x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write `out`. x and out are contiguous and of one of DTYPES, values and bias float32."""
    native.check_size("values", values, live.columns.numel())
    native.check_size("bias", bias, g.outputs)
    of_bias = None if bias is None else bias.data_ptr()
    given = (x.data_ptr(), _is_bfloat16(x), values.data_ptr(), of_bias, out.data_ptr())
    _library().gapfx_convolution_forward(ctypes.byref(g), ctypes.byref(live.native()), *given, torch.get_num_threads())


def of_input(g: Geometry, live: Live, gradient: Tensor, values: Tensor, out: Tensor) -> None:
    """Write `out`, the gradient of the input. gradient and out are contiguous, values float32."""
    native.check_size("values", values, live.columns.numel())
    given = (gradient.data_ptr(), _is_bfloat16(gradient), values.data_ptr(), out.data_ptr())
    _library().gapfx_convolution_of_input(ctypes.byref(g), ctypes.byref(live.native()), *given, torch.get_num_threads())


def of_values(g: Geometry, live: Live, x: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Write `out`, the float32 gradient of the live values; zeros are there before. x and gradient are contiguous."""
    given = (x.data_ptr(), gradient.data_ptr(), _is_bfloat16(x), out.data_ptr())
    _library().gapfx_convolution_of_values(
        ctypes.byref(g), ctypes.byref(live.native()), *given, torch.get_num_threads()
    )


def refusal(shape: Numbers) -> str:
    """Why a weight of this shape cannot be taken; "" when it can."""
    if native.missing_reason():
        return f"the native kernels are missing: {native.missing_reason()}"
    if not 3 <= len(shape) <= DIMS + 2:
        return f"a weight of {len(shape)} dimensions is none of a convolution in one to {DIMS}"
    if math.prod(shape[2:]) > MAX_TAPS:
        return f"more than {MAX_TAPS} taps"
    return "the weight has 2^31 elements or more" if math.prod(shape) > _MOST else ""


def tile_width(columns: int, num_live: int, rows: int) -> int:
    """Columns of a tile, equal ones as far as possible."""
    wanted = LIVE_IN_A_ROW * rows * columns // max(num_live, 1)
    most = min(max(wanted, NARROW), WIDE)
    return -(-columns // -(-columns // most))


@preparing()
def _prepare(bits: Tensor, shape: Numbers, groups: int) -> Live:
    rows, columns = shape[0], math.prod(shape[1:])
    bits = bits.contiguous()
    num_live = native.count(bits, rows * columns)
    width = tile_width(columns, num_live, rows)
    tiles = -(-columns // width)
    starts = torch.empty(rows * tiles + 1, dtype=torch.int32)
    live = torch.empty(num_live, dtype=torch.uint16)
    given = (bits.data_ptr(), rows, columns, rows // groups, width, starts.data_ptr(), live.data_ptr())
    return Live(starts, live, tiles, width, bool(_library().gapfx_convolution_prepare(*given)))


def _three(numbers: Numbers, fill: int) -> Any:
    return _Each(*(fill,) * (DIMS - len(numbers)), *numbers)


def _is_bfloat16(tensor: Tensor) -> int:
    assert tensor.dtype in DTYPES
    assert tensor.is_contiguous()
    return int(tensor.dtype is torch.bfloat16)


@cache
def _library() -> ctypes.CDLL:
    found = native.needed()
    address, integer = ctypes.c_void_p, ctypes.c_int
    common = [ctypes.POINTER(Geometry), ctypes.POINTER(_Live), address]
    found.gapfx_convolution_prepare.argtypes = [address, *[ctypes.c_int64] * 4, address, address]
    found.gapfx_convolution_forward.argtypes = [*common, integer, address, address, address, integer]
    found.gapfx_convolution_of_input.argtypes = [*common, integer, address, address, integer]
    found.gapfx_convolution_of_values.argtypes = [*common, address, integer, address, integer]
    return found
