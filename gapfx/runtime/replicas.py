"""Parallel GaP's exchange: replicas start from one state, and what they made of it is merged into one again.

A weight that a replica has grown and pruned is taken from that replica, with its mask and moments. Everything else,
weights of other groups (whose masks are the same in all replicas), biases, norms and embeddings, their moments and
running statistics, is the mean over replicas; whole-number buffers and the optimizer's step are those of the first.
Parameters that no optimizer trains stay as they are. Source: Ma et al., ICLR 2022, section 3.2, which takes partitions
from their replicas and says nothing of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gapfx.masks import num_bytes
from gapfx.plan import Phase, Plan
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import (
    OptimizerState,
    TrainState,
    bytes_of,
    column,
    joined_bits,
    num_before,
    own_part,
    whole_bits,
)
from gapfx.runtime.teams import Team


def for_team(state: TrainState, peers: Peers) -> TrainState:
    """A copy of the state, cut for a team (collective over all ranks); the state itself stays as it is."""
    copy = TrainState(state.layout, {}, {}, peers=peers, step=state.step)
    copy.buffers = {fqn: buffer.clone() for fqn, buffer in state.buffers.items()}
    for fqn in state.bits:
        copy.put_bits(fqn, bytes_of(whole_bits(state, fqn), *copy.bounds(fqn)).clone())
    copy.weights = {fqn: own_part(copy, fqn, column(state, state.weights, fqn)) for fqn in state.weights}
    moments = {
        key: {fqn: own_part(copy, fqn, column(state, table, fqn)) for fqn in table}
        for key, table in state.optimizer.moments.items()
    }
    copy.optimizer = OptimizerState(moments, [dict(group) for group in state.optimizer.scalars])
    for mine, table in ((copy.sparse_bits, state.sparse_bits), (copy.explored, state.explored)):
        for fqn, own in table.items():
            mine[fqn] = bytes_of(joined_bits(state, fqn, own), *copy.bounds(fqn)).clone()
    return copy


@dataclass
class Merge:
    """Collects replicas, turn after turn, into `into`, a state cut over all ranks, which holds the start till then."""

    plan: Plan
    phase: Phase
    start: TrainState
    into: TrainState = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.into = TrainState(self.start.layout, {}, {}, peers=self.start.peers)
        for table in ("bits", "lives", "sparse_bits", "explored"):
            setattr(self.into, table, dict(getattr(self.start, table)))

    def add(self, mine: TrainState, team: Team, turn: int, trained: frozenset[str]) -> None:
        """Take what each team made in this turn (collective over all ranks)."""
        owner = self._owners()
        first = turn * team.count
        self.into.step = mine.step
        for fqn, replica in owner.items():
            if first <= replica < first + team.count:
                self._take_masks(fqn, mine if replica - first == team.index else None)
        moments = {key: self.into.optimizer.moments.setdefault(key, {}) for key in mine.optimizer.moments}
        tables = [(self.into.weights, mine.weights)]
        tables += [(moments[key], table) for key, table in mine.optimizer.moments.items()]
        for into, table in tables:
            for fqn in table:
                if fqn not in owner:
                    self._add_share(into, table, fqn, mine, trained)
                elif first <= owner[fqn] < first + team.count:
                    is_mine = owner[fqn] - first == team.index
                    into[fqn] = self._taken(fqn, mine.num_live(fqn), mine if is_mine else None, table)
        self._add_buffers(mine, team, is_first=first == 0)
        if first == 0:
            self.into.optimizer.scalars = self.into.peers.tell(mine.optimizer.scalars)[0]

    def _owners(self) -> dict[str, int]:
        return {
            weight.fqn: replica
            for replica in range(self.phase.replicas)
            for group in self.phase.grown_by(replica)
            for weight in self.plan.groups[group].weights
        }

    def _take_masks(self, fqn: str, mine: TrainState | None) -> None:
        into, numel = self.into, self.into.layout[fqn].numel
        for name in ("sparse_bits", "explored"):
            whole = torch.zeros(num_bytes(numel), dtype=torch.uint8)
            if mine is not None:
                own: Tensor = getattr(mine, name)[fqn]
                start = num_bytes(mine.bounds(fqn)[0])
                whole[start : start + own.numel()] = own
            whole = into.peers.joined(whole)
            getattr(into, name)[fqn] = bytes_of(whole, *into.bounds(fqn)).clone()
        into.put_bits(fqn, into.sparse_bits[fqn])

    def _taken(self, fqn: str, num_live: int, mine: TrainState | None, table: Mapping[str, Tensor]) -> Tensor:
        """This rank's slice of a weight that one team owns."""
        whole = torch.zeros(self.into.num_live(fqn))
        if mine is not None:
            before, own = num_before(mine, fqn), table[fqn]
            whole[before : before + own.numel()] = own
        return own_part(self.into, fqn, self.into.peers.joined(whole))

    def _add_share(
        self, into: dict[str, Tensor], table: Mapping[str, Tensor], fqn: str, mine: TrainState, trained: frozenset[str]
    ) -> None:
        """Add the teams' values of a weight that nobody owns, each a part of the mean."""
        if fqn not in trained:
            into[fqn] = self.start.weights[fqn]
            return
        whole = torch.zeros(mine.num_live(fqn))
        before, own = num_before(mine, fqn), table[fqn]
        whole[before : before + own.numel()] = own / self.phase.replicas
        share = own_part(self.into, fqn, self.into.peers.total(whole))
        into[fqn] = into[fqn] + share if fqn in into else share

    def _add_buffers(self, mine: TrainState, team: Team, *, is_first: bool) -> None:
        speaks = team.peers.rank == 0
        for fqn, buffer in mine.buffers.items():
            if buffer.is_floating_point():
                part = buffer.float() / self.phase.replicas if speaks else torch.zeros(buffer.shape)
                total = self.into.peers.total(part).to(buffer.dtype)
                self.into.buffers[fqn] = self.into.buffers[fqn] + total if fqn in self.into.buffers else total
            elif is_first:
                self.into.buffers[fqn] = self.into.peers.tell(buffer)[0]

    def finish(self) -> None:
        """Put the merged state in the place of the start."""
        for name in ("weights", "buffers", "bits", "lives", "sparse_bits", "explored", "optimizer", "step"):
            setattr(self.start, name, getattr(self.into, name))
