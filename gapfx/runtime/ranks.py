"""Ranks that work on one model together: what they add up, tell each other, and what one does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Peers:
    """Rank `rank` of the `size` ranks that hold one model in slices; `group` None is all ranks of the run."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def all() -> Peers:
        """Every rank of the process group that was joined."""
        return Peers(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on each of them (collective); the given tensor may hold it afterwards."""
        if self.size == 1:
            return tensor
        moved = tensor.to(self._device())
        torch.distributed.all_reduce(moved, group=self.group)
        return moved.to(tensor.device)

    def joined(self, whole: Tensor) -> Tensor:
        """A tensor of which every rank has filled its own part, and no other's, of zeros (collective).

        Exact to the bit: 4-byte numbers are added as integers, which keeps the sign of zero and every NaN.
        """
        if self.size == 1:
            return whole
        if whole.element_size() == 4:
            return self.total(whole.view(torch.int32)).view(whole.dtype)
        return self.total(whole)

    def tell(self, value: object) -> list[Any]:
        """What every rank says, by rank (collective)."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, value, group=self.group)
        return every

    def _device(self) -> torch.device:
        is_on_cards = "nccl" in str(torch.distributed.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if is_on_cards else torch.device("cpu")


def raise_together(peers: Peers, failure: Exception | None) -> None:
    """Raise the failure of the lowest rank that has one on every rank, so that none waits for ever (collective)."""
    for other in peers.tell(failure):
        if other is not None:
            raise other


def on_each(peers: Peers, action: Callable[[], object]) -> None:
    """Run `action` on every rank; the first error is raised on all of them (collective)."""
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    raise_together(peers, failure)


def on_first(peers: Peers, action: Callable[[], object]) -> None:
    """Run `action` on the first rank; its error is raised on every rank (collective)."""
    on_each(peers, action if peers.rank == 0 else lambda: None)


def on_rank_0(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 of the run; its error is raised on every rank (collective)."""
    on_first(Peers.all(), action)


def told_by_rank_0(action: Callable[[], ResultT]) -> ResultT:
    """What `action` gives on rank 0 of the run, on every rank; its error is raised on every rank (collective)."""
    found: list[ResultT] = []
    on_rank_0(lambda: found.append(action()))
    return Peers.all().tell(found)[0][0]
