"""Whether all ranks have a gradient for the same weights: ZeRO adds up whatever there is, in the order it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gapfx.errors import TaskError
from gapfx.runtime.ranks import Peers


@dataclass
class SameWeights:
    """Looks at the losses of a step before their backward.

    Stage 2 adds up gradients in each backward, stage 1 once a step (`is_each` False). Stage 0 puts zeros where a rank
    has none, and at stage 3 ranks would wait for one another in the forward already.
    """

    trained: Mapping[str, Tensor]
    peers: Peers
    is_each: bool
    _reached: set[int] = field(default_factory=set[int])

    @staticmethod
    def of(trained: Mapping[str, Tensor], peers: Peers, zero_stage: int) -> SameWeights | None:
        """For an engine's trained parameters by FQN; None where there is nothing to look at."""
        return SameWeights(trained, peers, zero_stage == 2) if peers.size > 1 and zero_stage in (1, 2) else None

    def check(self, loss: Tensor, *, is_last: bool) -> None:
        """Raise TaskError on every rank when some of them, and not all, come to a weight (collective)."""
        self._reached |= reached(loss)
        if not (self.is_each or is_last):
            return
        own = torch.tensor([float(id(parameter) in self._reached) for parameter in self.trained.values()])
        self._reached.clear()
        counts = self.peers.total(own).tolist()
        partly = [fqn for fqn, count in zip(self.trained, counts, strict=True) if 0 < count < self.peers.size]
        if partly:
            more = f" and {len(partly) - 1} more" if len(partly) > 1 else ""
            raise TaskError(
                f"some of the {self.peers.size} ranks trained {partly[0]}{more} in this step, and others did not",
                fix="run every module on every rank, an expert that was sent nothing on an empty batch; "
                "or train with --zero 0, or on one rank",
            )


def reached(loss: Tensor) -> set[int]:
    """The id of every leaf that a backward from the loss gives a gradient."""
    seen, found = set[Any](), set[int]()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found
