"""Masks that sit in the reads of a module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gapfx.sparse import sparsify


class Listed(nn.Module):
    """Weights in a ParameterList, whose names are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def test_the_weights_of_a_parameter_list_are_masked() -> None:
    torch.manual_seed(0)
    model, x = Listed(), torch.randn(2, 4)
    plain = copy.deepcopy(model)
    sparse = sparsify(model, (x,), sparsity=0.5)
    plain.load_state_dict(sparse.dense_state_dict())
    assert [int((weight == 0).sum()) for weight in plain.weights] == [8, 8, 8]
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
