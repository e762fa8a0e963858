"""Ranks that are threads of this process: what they compute, without the cost of starting any."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gapfx.runtime.ranks import Peers

Result = TypeVar("Result")


@dataclass
class Room:
    """Where threads meet: everyone says something and hears all."""

    size: int
    said: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.said, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)

    def hear(self, rank: int, value: object) -> list[Any]:
        self.said[rank] = value
        self.barrier.wait()
        every = list(self.said)
        self.barrier.wait()
        return every


@dataclass(frozen=True)
class ThreadPeers(Peers):
    """Peers in a room."""

    room: Room = field(default_factory=lambda: Room(1))

    def total(self, tensor: Tensor) -> Tensor:
        # As an all-reduce does, it leaves the sum in what it was given.
        return tensor.copy_(torch.stack(self.room.hear(self.rank, tensor.clone())).sum(0, dtype=tensor.dtype))

    def tell(self, value: object) -> list[Any]:
        return self.room.hear(self.rank, value)


def on_ranks(size: int, action: Callable[[Peers], Result]) -> list[Result]:
    """What `action` gives on each of `size` ranks; the first rank's error is raised."""
    room, results, errors = Room(size), dict[int, Result](), dict[int, BaseException]()

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadPeers(rank, size, None, room))
        except BaseException as error:
            errors[rank] = error
            if not all(rank in errors for rank in range(size)):
                threading.Timer(1, room.barrier.abort).start()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in sorted(errors):
        if not isinstance(errors[rank], threading.BrokenBarrierError):
            raise errors[rank]
    return [results[rank] for rank in range(size)]


def at(peers: Peers, state: Any) -> Any:
    """A copy of a whole state, with a rank's slices of it."""
    from gapfx.masks import count_kept
    from gapfx.runtime.state import bytes_of, own_part

    bounds = {fqn: spread.all_bounds(peers.size) for fqn, spread in state.layout.items()}
    lives = {fqn: tuple(count_kept(bytes_of(bits, *each)) for each in bounds[fqn]) for fqn, bits in state.bits.items()}
    mine = dataclasses.replace(state, peers=peers, lives=lives)
    cut = {fqn: own_part(mine, fqn, value) for fqn, value in state.weights.items()}
    moments = {
        key: {fqn: own_part(mine, fqn, value) for fqn, value in table.items()}
        for key, table in state.optimizer.moments.items()
    }
    return dataclasses.replace(
        mine,
        weights=cut,
        bits={fqn: bytes_of(bits, *mine.bounds(fqn)).clone() for fqn, bits in state.bits.items()},
        sparse_bits={fqn: bytes_of(bits, *mine.bounds(fqn)).clone() for fqn, bits in state.sparse_bits.items()},
        explored={fqn: bytes_of(bits, *mine.bounds(fqn)).clone() for fqn, bits in state.explored.items()},
        optimizer=dataclasses.replace(state.optimizer, moments=moments),
    )
