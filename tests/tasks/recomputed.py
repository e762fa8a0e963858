"""The task of classify.py whose blocks are recomputed in the backward."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tasks.classify import Net, data, defaults, evaluate, loss, optimizer

__all__ = ["data", "defaults", "evaluate", "loss", "model", "optimizer", "reentrant"]


class Recomputed(Net):
    """The same model in less memory."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self._recomputed(block, x) if x.requires_grad else block(x)
        return self.head(self.norm(x))

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(block, x, use_reentrant=self.use_reentrant))


def model() -> nn.Module:
    return Recomputed()


def reentrant() -> nn.Module:
    """By torch's older way, which runs the blocks without a graph at first."""
    net = Recomputed()
    net.use_reentrant = True
    return net
