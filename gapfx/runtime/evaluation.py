"""Evaluations that are given up when a stop is asked for: at the next batch, by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gapfx.errors import Interrupted
from gapfx.runtime.ranks import Peers

# Takes what it has to call before each batch.
Evaluate = Callable[[nn.Module, Callable[[], object]], dict[str, float]]


def evaluated(
    evaluate: Evaluate, module: nn.Module, peers: Peers, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Metrics of the module; None, on every rank, when any wants to stop before all are done (collective)."""
    agreement = _Agreement(peers, should_stop)
    try:
        with torch.no_grad():
            metrics = evaluate(module, agreement.ask)
        while not agreement.ask(is_done=True):
            pass
    except Exception:
        if agreement.is_stopped:  # whatever the task has made of it on the way
            return None
        raise
    return metrics


@dataclass
class _Agreement:
    """Whether any rank wants to stop. One that is done answers until all are, as ranks may take unequal batches."""

    peers: Peers
    should_stop: Callable[[], bool]
    is_stopped: bool = False

    def ask(self, *, is_done: bool = False) -> bool:
        """Whether all are done (collective). Raises Interrupted on every rank when any wants to stop."""
        is_end = False
        if not self.is_stopped:
            facts = torch.tensor([float(self.should_stop()), float(is_done)], dtype=torch.float64)
            num_stops, num_done = self.peers.total(facts).tolist()
            self.is_stopped, is_end = num_stops > 0, num_done == self.peers.size
        if self.is_stopped:
            raise Interrupted("the evaluation was given up")
        return is_end
