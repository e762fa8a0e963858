"""The task of classify.py whose blocks are recomputed in the backward."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tasks.classify import Net, data, defaults, evaluate, loss, optimizer

__all__ = ["data", "defaults", "evaluate", "loss", "model", "optimizer"]


class Recomputed(Net):
    """The same model in less memory."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return self.head(self.norm(x))


def model() -> nn.Module:
    return Recomputed()
