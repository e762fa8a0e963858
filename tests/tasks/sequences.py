"""A task whose weights are used in other ways than products: attention, a recurrent layer and a lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]
defaults = {
    "sparsity": 0.8,
    "groups": 2,
    "rounds": 1,
    "phase_epochs": 0.25,
    "finetune_epochs": 0.25,
    "batch_size": 16,
    "prune_embeddings": True,
}


class Net(nn.Module):
    """Tokens, attention in a residual, an LSTM, a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0])


def model() -> nn.Module:
    return Net()


def data(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed({"train": 0, "val": 1}[split])
    tokens = torch.randint(0, 24, (256 if split == "train" else 32, 9), generator=generator)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float().flatten(0, 1), batch[1].flatten())
