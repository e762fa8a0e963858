"""Expand and gather of live values on CUDA, in Triton; importing this module needs Triton.

A program takes a tile of 1024 weights: 32 mask words of 32 bits, whose running count says where in the packed values
each live weight is. How many live weights lie before each tile depends on the mask alone: it is counted once and kept
with the bits, four bytes a tile (a byte for 256 weights). With TRITON_INTERPRET=1 tensors on the CPU are taken too.
"""

# The annotations of kernels are Triton's own, and its decorator has no types; nor has the package where it is missing.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportIndexIssue=false

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
# Values are moved, never computed with, so that every bit arrives, of NaN and -0.0 too.
_WORDS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _live_bits(words: Any, at: Any, numel: Any) -> Any:
    """0 or 1 for each weight of a tile."""
    word = tl.load(words + at // 32, mask=at < numel, other=0)
    return tl.where(at < numel, (word >> (at % 32).to(tl.int32)) & 1, 0)


@triton.jit
def _count_tile(words: Any, counts: Any, numel: Any, SIZE: tl.constexpr) -> None:
    tile = tl.program_id(0).to(tl.int64)
    at = tile * SIZE + tl.arange(0, SIZE)
    tl.store(counts + tile, tl.sum(_live_bits(words, at, numel), axis=0))


@triton.jit
def _expand_tile(values: Any, words: Any, before: Any, dense: Any, numel: Any, SIZE: tl.constexpr) -> None:
    tile = tl.program_id(0).to(tl.int64)
    at = tile * SIZE + tl.arange(0, SIZE)
    live = _live_bits(words, at, numel)
    place = tl.load(before + tile) + tl.cumsum(live, axis=0) - live
    value = tl.load(values + place, mask=live != 0, other=0)
    tl.store(dense + at, value.to(dense.dtype.element_ty), mask=at < numel)


@triton.jit
def _gather_tile(dense: Any, words: Any, before: Any, values: Any, numel: Any, SIZE: tl.constexpr) -> None:
    tile = tl.program_id(0).to(tl.int64)
    at = tile * SIZE + tl.arange(0, SIZE)
    live = _live_bits(words, at, numel)
    place = tl.load(before + tile) + tl.cumsum(live, axis=0) - live
    value = tl.load(dense + at, mask=live != 0, other=0)
    tl.store(values + place, value.to(values.dtype.element_ty), mask=live != 0)


@dataclass(frozen=True)
class _Prepared:
    """What a mask says of itself: how many live weights lie before each tile.

    `padded` is a copy in whole words of a mask that has none. A view would tie the storage to itself, for ever.
    """

    key: tuple[int, ...]
    before: Tensor
    padded: Tensor | None


def expand(values: Tensor, bits: Tensor, dense: Tensor) -> None:
    """Write `dense` (contiguous): the next of `values` where its bit is 1, else 0; in the dtype of `dense`."""
    source, target = _as_words(values.contiguous(), dense)
    _launch(_expand_tile, source, bits, target, dense.numel())


def gather(dense: Tensor, bits: Tensor, values: Tensor) -> None:
    """Write `values` (contiguous): those of `dense` (contiguous) whose bit is 1, in order; in the dtype of `values`."""
    source, target = _as_words(dense, values)
    _launch(_gather_tile, source, bits, target, dense.numel())


def _launch(kernel: Any, source: Tensor, bits: Tensor, target: Tensor, numel: int) -> None:
    if numel:
        prepared = _prepared(bits, numel)
        words = (bits if prepared.padded is None else prepared.padded).view(torch.int32)
        with _on(bits.device):
            kernel[(_num_tiles(numel),)](source, words, prepared.before, target, numel, SIZE=TILE)


def _as_words(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as whole numbers, unless the kernel has to convert one dtype to the other."""
    if source.dtype != target.dtype:
        return source, target
    word = _WORDS_OF[source.element_size()]
    return source.view(word), target.view(word)


def _prepared(bits: Tensor, numel: int) -> _Prepared:
    """From the storage of the bits, where it was kept, unless they were written since."""
    if bits.is_inference():  # has no version: nobody could tell whether it was written
        return _prepare(bits, numel, ())
    key = (bits._version, int(bits.storage_offset()), bits.numel(), numel)
    storage: Any = bits.untyped_storage()
    kept: _Prepared | None = getattr(storage, "gapfx_tiles", None)
    if kept is None or kept.key != key:
        kept = storage.gapfx_tiles = _prepare(bits, numel, key)
    return kept


def _prepare(bits: Tensor, numel: int, key: tuple[int, ...]) -> _Prepared:
    padded = None if _is_in_words(bits) else F.pad(bits, (0, -bits.numel() % 4)).clone()
    words = (bits if padded is None else padded).view(torch.int32)
    counts = torch.empty(_num_tiles(numel), dtype=torch.int32, device=bits.device)
    with _on(bits.device):
        _count_tile[(counts.numel(),)](words, counts, numel, SIZE=TILE)
    before = counts.cumsum(0) - counts
    return _Prepared(key, before if numel >= 2**31 else before.int(), padded)


def _is_in_words(bits: Tensor) -> bool:
    return bits.is_contiguous() and bits.numel() % 4 == 0 and bits.storage_offset() % 4 == 0


def _num_tiles(numel: int) -> int:
    return -(-numel // TILE)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
