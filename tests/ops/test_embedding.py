"""Lookups in compact tables against masked ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.ops.embedding import embedding
from tests.ops.compact import DTYPES, a_weight, assert_bitwise

INDICES = (
    torch.tensor([1, 3, 3, 0]),
    torch.arange(10).view(2, 5),
    torch.tensor(4),
    torch.empty(0, dtype=torch.long),
    torch.tensor([[3, 1], [9, 0]], dtype=torch.int32),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("scale", [False, True])
def test_it_equals_the_masked_lookup_to_the_bit(
    dtype: torch.dtype, indices: Tensor, padding: int | None, scale: bool
) -> None:
    weight = a_weight(10, 6, dtype=dtype)
    place = -1 if padding is None else padding
    assert_bitwise(
        weight,
        lambda values: embedding(indices, values, weight.bits, [10, 6], place, scale),
        lambda dense: F.embedding(indices, dense, padding, None, 2.0, scale),
    )


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torch_accepts_the_op() -> None:
    weight = a_weight(10, 6)
    given = (INDICES[1], weight.values.requires_grad_(), weight.bits, [10, 6], 3, False)
    torch.library.opcheck(torch.ops.gapfx.embedding.default, given)
