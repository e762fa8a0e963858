"""The state of a run between two engines: each rank holds a slice of every weight, of its live values alone.

A weight is cut into one run of its flat dense order a rank, at multiples of its granule, which is a multiple of 8 (so
that packed masks are cut at bytes) and of what its pattern takes as one. Of that run a rank holds the live values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gapfx.masks import count_kept, num_bytes, pack
from gapfx.ops.expand import dense_of, packed_of
from gapfx.runtime.ranks import Peers

Scalar = float | int
Owed = Literal["", "trained", "pruned", "end"]
BYTE = 8


@dataclass
class OptimizerState:
    """Optimizer state, free of how an engine stores it.

    `moments` maps a state's name (`exp_avg`) to FQN -> fp32 live values of this rank's slice; `scalars` holds, for each
    parameter group, the states that are one number (`step`) and whether the optimizer keeps it as a tensor; what steps
    have changed in the group itself stands there as `group:NAME`.
    """

    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    scalars: list[dict[str, tuple[Scalar, bool]]] = field(default_factory=list[dict[str, tuple[Scalar, bool]]])


@dataclass(frozen=True)
class Spread:
    """How a parameter of a dense `shape` is cut over ranks: at multiples of `granule` in flat order."""

    shape: tuple[int, ...]
    granule: int = BYTE

    @property
    def numel(self) -> int:
        """Number of dense weights."""
        return math.prod(self.shape)

    def bounds(self, rank: int, size: int) -> tuple[int, int]:
        """Start and stop of a rank's slice; slices at the end may be shorter, or empty."""
        per_rank = -(-self.numel // (self.granule * size)) * self.granule
        return min(rank * per_rank, self.numel), min((rank + 1) * per_rank, self.numel)

    def all_bounds(self, size: int) -> list[tuple[int, int]]:
        """Start and stop of the slice of each rank."""
        return [self.bounds(rank, size) for rank in range(size)]


@dataclass
class TrainState:
    """All that outlives an engine; `peers` hold it together.

    layout: FQN of every parameter -> how it is cut. buffers: FQN -> buffer, whole. lives: FQN -> number of live values
    in each rank's slice. Of this rank's slice: weights, FQN -> live fp32 values; bits, FQN -> packed mask in force;
    sparse_bits, the mask when the weight was last sparse; explored, bits of weights that were live in any phase so
    far; aside, dense fp32 values that were kept for a later phase (see gapfx.runtime.aside).
    `step` counts optimizer steps done. `owed` is the evaluation of that step which is still to be made: as the weights
    were trained, which at a phase's end is before its prune, or pruned; or the phase's end, without one.
    """

    layout: dict[str, Spread]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    bits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    sparse_bits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    explored: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    aside: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    lives: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    peers: Peers = field(default_factory=Peers)
    step: int = 0
    owed: Owed = ""

    def bounds(self, fqn: str) -> tuple[int, int]:
        """Start and stop of this rank's slice of a weight."""
        return self.layout[fqn].bounds(self.peers.rank, self.peers.size)

    def put_bits(self, fqn: str, own: Tensor) -> None:
        """Put the packed mask of this rank's slice in force; values and moments are left alone (collective)."""
        counts = torch.zeros(self.peers.size, dtype=torch.int64)
        counts[self.peers.rank] = count_kept(own)
        self.bits[fqn], self.lives[fqn] = own, tuple(self.peers.total(counts).tolist())

    def put_ones(self, fqn: str) -> None:
        """A mask that keeps everything."""
        start, stop = self.bounds(fqn)
        self.bits[fqn] = pack(torch.ones(stop - start, dtype=torch.bool))
        self.lives[fqn] = tuple(last - first for first, last in self.layout[fqn].all_bounds(self.peers.size))

    def num_live(self, fqn: str) -> int:
        """Number of live values in all slices."""
        return sum(self.lives[fqn]) if fqn in self.bits else self.layout[fqn].numel

    def is_all_live(self, fqn: str) -> bool:
        """Whether no value of it is masked."""
        return self.num_live(fqn) == self.layout[fqn].numel

    def tables(self, fqn: str) -> list[dict[str, Tensor]]:
        """Where values of a weight are: the weight itself, and its moments."""
        return [table for table in (self.weights, *self.optimizer.moments.values()) if fqn in table]


def bytes_of(bits: Tensor, start: int, stop: int) -> Tensor:
    """The packed mask of weights `start` (a multiple of 8, or the end) to `stop`."""
    return bits[num_bytes(start) : num_bytes(stop)]


def dense_slice(state: TrainState, table: Mapping[str, Tensor], fqn: str) -> Tensor:
    """This rank's slice of a weight or moment with its zeros in place, flat."""
    (start, stop), bits = state.bounds(fqn), state.bits.get(fqn)
    return table[fqn] if bits is None else dense_of(table[fqn].view(-1, 1), bits, (stop - start,))


def live_slice(dense: Tensor, bits: Tensor | None) -> Tensor:
    """The live values of a flat slice, in memory of their own."""
    return (dense if bits is None else packed_of(dense, bits, (count_kept(bits), 1))).clone().flatten()


def column(state: TrainState, table: Mapping[str, Tensor], fqn: str) -> Tensor:
    """All live values of a weight or moment in flat order (collective); not to be written, it may be the slice."""
    own = table[fqn]
    if state.peers.size == 1:
        return own
    whole = own.new_zeros(state.num_live(fqn))
    first = num_before(state, fqn)
    whole[first : first + own.numel()] = own
    return state.peers.joined(whole)


def whole(state: TrainState, table: Mapping[str, Tensor], fqn: str) -> Tensor:
    """The dense weight or moment with its zeros in place (collective); not to be written, it may be the slice."""
    shape, values = state.layout[fqn].shape, column(state, table, fqn)
    if state.is_all_live(fqn):
        return values.view(shape)
    return dense_of(values.view(-1, 1), whole_bits(state, fqn), shape)


def own_part(state: TrainState, fqn: str, values: Tensor) -> Tensor:
    """This rank's slice of all live values of a weight, in memory of its own."""
    start, stop = state.bounds(fqn)
    first, count = num_before(state, fqn), state.lives[fqn][state.peers.rank] if fqn in state.bits else stop - start
    return values.flatten()[first : first + count].clone()


def num_before(state: TrainState, fqn: str) -> int:
    """Number of live values in the slices of lower ranks."""
    return sum(state.lives[fqn][: state.peers.rank]) if fqn in state.bits else state.bounds(fqn)[0]


def whole_bits(state: TrainState, fqn: str) -> Tensor:
    """The whole packed mask in force (collective); not to be written, it may be the slice."""
    return joined_bits(state, fqn, state.bits[fqn])


def joined_bits(state: TrainState, fqn: str, own: Tensor) -> Tensor:
    """The whole packed mask from the slices of all ranks (collective)."""
    if state.peers.size == 1:
        return own
    bits = torch.zeros(num_bytes(state.layout[fqn].numel), dtype=torch.uint8)
    start = num_bytes(state.bounds(fqn)[0])
    bits[start : start + own.numel()] = own
    return state.peers.joined(bits)
