"""Writes safetensors files tensor by tensor, so that no more than one of them is in memory.

The library writes a file from tensors that are all in memory. The format: 8 bytes of length, that much JSON, the
tensors one after another (https://github.com/huggingface/safetensors). Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16"},
    **{torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, what it is like, and what makes it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries in the order of the format: wide elements first, so that all are aligned."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the tensors; the entries are in the order in which they follow."""
    facts: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        offsets = [at, at + entry.num_bytes]
        facts[entry.key] = {"dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.num_bytes
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    found = hashlib.sha256(f"{TYPES[tensor.dtype]} {list(tensor.shape)} ".encode())
    found.update(raw(tensor))
    return found.hexdigest()


def write_tensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write the file beside its place and put it there when it is whole. Raises OSError, with nothing left behind."""
    ordered = in_order(entries)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(header(ordered, metadata))
            for entry in ordered:
                tensor = entry.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
                file.write(raw(tensor))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
