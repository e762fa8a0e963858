"""Values of floating numbers byte by byte, each kind of byte compressed by itself with zstd.

Exponents of trained weights are alike, their mantissas random: split, the first compress and the second do no harm.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapfx.errors import UserError

LEVEL = 9
Bytes = NDArray[np.uint8]


def encode(values: Tensor) -> list[bytes]:
    """A compressed stream for each byte of an element, the lowest first. Raises UserError without zstandard."""
    planes = values.contiguous().view(-1, 1).view(torch.uint8).numpy().T
    return [_zstandard().ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(plane).data) for plane in planes]


def decode(planes: list[Bytes], count: int, dtype: torch.dtype) -> Tensor:
    """The `count` values. Raises ValueError for streams of others, before anything is allocated for them."""
    if len(planes) != dtype.itemsize:
        raise ValueError(f"{len(planes)} streams of bytes are no {dtype}")
    whole = np.empty((count, len(planes)), np.uint8)
    for index, plane in enumerate(planes):
        whole[:, index] = np.frombuffer(_decompressed(plane.tobytes(), count), np.uint8)
    # Flat first: an array without values has strides of 0, by which torch takes no view.
    return torch.from_numpy(whole).flatten().view(dtype)


def _decompressed(plane: bytes, count: int) -> bytes:
    library = _zstandard()
    try:
        if library.frame_content_size(plane) != count:
            raise ValueError(f"a stream of bytes is not {count} long")
        found: bytes = library.ZstdDecompressor().decompress(plane, max_output_size=count)
    except library.ZstdError as error:
        raise ValueError(f"a stream of bytes is damaged: {error}") from error
    if len(found) != count:
        raise ValueError(f"a stream of bytes is not {count} long")
    return found


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise UserError("values are compressed by the library zstandard", fix="pip install zstandard") from error
