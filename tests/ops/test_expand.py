"""Compact values to their dense shape and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapfx.masks import pack
from gapfx.ops.expand import dense_of, expand, gather, packed_of
from tests.ops.compact import a_weight

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.sampled_from(DTYPES))
def test_values_come_back_from_where_they_were_put(live: list[bool], dtype: torch.dtype) -> None:
    mask = torch.tensor(live)
    values = torch.randn(sum(live), 1).to(dtype)
    dense = expand(values, pack(mask), [len(live)])
    assert torch.equal(dense, torch.zeros(len(live), dtype=dtype).masked_scatter(mask, values))
    assert torch.equal(gather(dense, pack(mask), [sum(live), 1]), values)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", [(8,), (3, 5), (4, 2, 3, 3)])
def test_torch_accepts_the_ops(shape: tuple[int, ...]) -> None:
    weight = a_weight(*shape)
    values, dense = weight.values.requires_grad_(), weight.dense.requires_grad_()
    torch.library.opcheck(torch.ops.gapfx.expand.default, (values, weight.bits, list(shape)))
    torch.library.opcheck(torch.ops.gapfx.gather.default, (dense, weight.bits, list(values.shape)))


def test_each_op_is_the_derivative_of_the_other() -> None:
    weight = a_weight(4, 5)
    values = weight.values.clone().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: expand(v, weight.bits, [4, 5]), [values])  # pyright: ignore
    dense = weight.dense.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: gather(d, weight.bits, list(values.shape)), [dense])  # pyright: ignore


def test_a_gather_takes_any_layout() -> None:
    weight = a_weight(4, 6)
    turned = weight.dense.t().contiguous().t()
    assert torch.equal(gather(turned, weight.bits, [int(weight.mask.sum())]), weight.dense[weight.mask])


def test_a_weight_that_is_all_live_is_not_copied() -> None:
    weight = a_weight(4, 6, share=2)
    values = weight.values
    assert dense_of(values, weight.bits, (4, 6)).data_ptr() == values.data_ptr()
    assert packed_of(weight.dense, weight.bits, (24, 1)).data_ptr() == weight.dense.data_ptr()
