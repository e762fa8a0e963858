"""Native counts of the sixteen-bit halves of ordered keys, from which an exact threshold follows."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from gapfx.kernels import native

NUM_COUNTS = 1 << 16
# The kernel makes an unsigned key of 32 bits from each.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}


def can_take(scores: Tensor) -> bool:
    """Whether the kernels work on these scores: on the CPU, float32, bfloat16 or int32."""
    return scores.device.type == "cpu" and scores.dtype in KINDS and native.library() is not None


def counts(scores: Tensor, high: int | None = None) -> Tensor:
    """How many keys have each high half, int64 [65536]; with `high` each low half of those with that high half."""
    scores, found = scores.contiguous(), torch.empty(NUM_COUNTS, dtype=torch.int64)
    _library().gapfx_histogram(*_given(scores), -1 if high is None else high, found.data_ptr(), torch.get_num_threads())
    return found


def mark(scores: Tensor, key: int, num_tied: int) -> Tensor:
    """Bool mask: True above `key`, and at the first `num_tied` places in flat order that equal it."""
    scores, mask = scores.contiguous(), torch.empty(scores.shape, dtype=torch.bool)
    _library().gapfx_mark(*_given(scores), key, num_tied, mask.data_ptr(), torch.get_num_threads())
    return mask


def num_nan(scores: Tensor) -> int:
    """How many scores are NaN."""
    scores = scores.contiguous()
    return _library().gapfx_num_nan(*_given(scores), torch.get_num_threads())


def _given(scores: Tensor) -> tuple[int, int, int]:
    return scores.data_ptr(), scores.numel(), KINDS[scores.dtype]


@cache
def _library() -> ctypes.CDLL:
    found = native.needed()
    scores = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    found.gapfx_histogram.argtypes = [*scores, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    found.gapfx_mark.argtypes = [*scores, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    found.gapfx_num_nan.argtypes, found.gapfx_num_nan.restype = [*scores, ctypes.c_int], ctypes.c_int64
    return found
