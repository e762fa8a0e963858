"""Reads one rank's slices from files that another number of ranks may have written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gapfx.masks import count_kept, num_bytes
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import Spread, bytes_of

TABLES = ("weights", "bits", "sparse_bits", "explored", "aside")


def slice_file(rank: int) -> str:
    """Name of the file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def read_slices(
    directory: Path, layout: dict[str, Spread], num_slices: int, peers: Peers
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """Table -> FQN -> this rank's slice, cut for `peers` (`buffers` as they are), and how many live in each slice.

    Raises KeyError, ValueError or safetensors' error for files that do not fit together.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(directory / slice_file(rank), framework="pt")) for rank in range(num_slices)
        ]
        return _Source(files, layout, peers).tables()


@dataclass(frozen=True)
class _Source:
    files: list[Any]
    layout: dict[str, Spread]
    peers: Peers

    def tables(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
        """One weight after another, so that no rank holds more than one mask whole."""
        tables_of: dict[str, list[str]] = {}
        for key in self.files[0].keys():  # noqa: SIM118
            table, _, fqn = key.partition("/")
            tables_of.setdefault(fqn, []).append(table)
        found: dict[str, dict[str, Tensor]] = {table: {} for table in (*TABLES, "buffers")}
        lives: dict[str, tuple[int, ...]] = {}
        for fqn, tables in tables_of.items():
            bits = self._whole_bits(fqn) if "bits" in tables else None
            if bits is not None:
                lives[fqn] = self._counts(fqn, bits)
            for table in tables:
                found.setdefault(table, {})[fqn] = self._slice(table, fqn, bits)
        return found, lives

    def _slice(self, table: str, fqn: str, bits: Tensor | None) -> Tensor:
        if table == "buffers":
            return self.files[0].get_tensor(f"buffers/{fqn}")
        if table in ("bits", "sparse_bits", "explored"):
            joined = bits if table == "bits" and bits is not None else self._joined(f"{table}/{fqn}")
            return bytes_of(joined, *self._bounds(fqn)).clone()
        return self._values(table, fqn, None if table == "aside" else bits)

    def _bounds(self, fqn: str) -> tuple[int, int]:
        return self.layout[fqn].bounds(self.peers.rank, self.peers.size)

    def _counts(self, fqn: str, bits: Tensor) -> tuple[int, ...]:
        bounds = self.layout[fqn].all_bounds(self.peers.size)
        return tuple(count_kept(bytes_of(bits, start, stop)) for start, stop in bounds)

    def _whole_bits(self, fqn: str) -> Tensor:
        bits = self._joined(f"bits/{fqn}")
        if bits.numel() != num_bytes(self.layout[fqn].numel):
            raise ValueError(f"the mask of {fqn} has {bits.numel()} bytes")
        return bits

    def _joined(self, key: str) -> Tensor:
        return torch.cat([file.get_tensor(key) for file in self.files])

    def _values(self, table: str, fqn: str, bits: Tensor | None) -> Tensor:
        parts = list(self._pieces(table, fqn, bits))
        return torch.cat(parts) if parts else torch.zeros(0)

    def _pieces(self, table: str, fqn: str, bits: Tensor | None) -> Iterator[Tensor]:
        """The values of this rank's slice, file by file."""
        start, stop = self._bounds(fqn)
        for index, file in enumerate(self.files):
            first, last = self.layout[fqn].bounds(index, len(self.files))
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            held, live = file.get_slice(f"{table}/{fqn}"), _num_live(bits, first, last)
            if held.get_shape() != [live]:
                raise ValueError(f"{table} of {fqn} has {held.get_shape()} values in a slice, {live} are live")
            before = _num_live(bits, first, low)
            yield held[before : before + _num_live(bits, low, high)]


def _num_live(bits: Tensor | None, start: int, stop: int) -> int:
    return stop - start if bits is None else count_kept(bytes_of(bits, start, stop))
