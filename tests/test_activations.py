"""What a forward keeps for its backward, against numbers known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gapfx.activations import Activations, kept_bytes


class TwoLayers(nn.Module):
    """Keeps its input, and the hidden layer behind the ReLU, once for both that need it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("value_bytes", [2, 4])
def test_each_memory_counts_once_and_weights_do_not(device: str, value_bytes: int) -> None:
    model, x = TwoLayers().to(device), torch.randn(5, 6, device=device)
    assert kept_bytes(model, lambda module: module(x).sum(), value_bytes) == value_bytes * (5 * 6 + 5 * 10)


def test_what_is_recomputed_is_not_kept() -> None:
    model, x = TwoLayers(), torch.randn(5, 6, requires_grad=True)
    kept = kept_bytes(model, lambda module: checkpoint(module, x, use_reentrant=True), 4)
    assert kept == 4 * 5 * 6, "the input alone"


def test_whole_numbers_keep_their_size() -> None:
    model, places = nn.Embedding(10, 4), torch.zeros(3, 7, dtype=torch.int64)
    assert kept_bytes(model, lambda module: module(places), 2) == 8 * 3 * 7


def test_a_rank_holds_those_of_its_micro_batch_and_of_one_sample_at_least() -> None:
    kept = Activations(800, samples=8, batch=64)
    assert [kept.of_rank(ranks) for ranks in (1, 8, 64, 1024)] == [6400, 800, 100, 100]
    assert Activations(800, 8, 64, micro_batch=2).of_rank(8) == 200


def test_a_step_takes_as_many_forwards_as_its_share_of_the_batch() -> None:
    kept = Activations(800, samples=8, batch=64)
    assert [kept.forwards(ranks) for ranks in (1, 2, 64, 1024)] == [8, 4, 1 / 8, 1 / 8]
    assert [Activations(800, 8, 64, micro_batch=2).forwards(ranks) for ranks in (4, 64)] == [2, 1 / 4]
