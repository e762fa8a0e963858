"""Products with a sparse weight against dense ones in fp64: every size around a panel, a register and a tile."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from gapfx.kernels import linear
from gapfx.masks import pack
from tests.kernels.needs import needs_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.usefixtures("level"),
]
SIDES = (1, 2, 5, 15, 16, 17, 33, 64, 65, 130)
TOKENS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100, 128, 129, 200)
SHARES = (0.0, 0.02, 0.3, 1.0)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def a_mask(outputs: int, inputs: int, share: float, block: int) -> Tensor:
    """Random, with one live place at least and, from a share of 0.3 down, rows without any."""
    mask = torch.rand(outputs // block, inputs) < share
    if share < 0.5:
        mask[::3] = False
    mask[-1, -1] = True
    return mask.repeat_interleave(block, 0)


def check(mask: Tensor, num_tokens: int, *, has_bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
    outputs, inputs = mask.shape
    weight = torch.randn(outputs, inputs).to(dtype) * mask
    x, gradient = torch.randn(num_tokens, inputs).to(dtype), torch.randn(num_tokens, outputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    index = linear.index_of(pack(mask), mask.shape)
    values = weight[mask].view(-1, 1)
    y = linear.forward(x, values, index, bias)
    of_x, of_values = linear.backward(gradient, x, values, index, needs_x=True, needs_values=True)
    assert of_x is not None
    assert of_values is not None
    wide, up = x.double(), gradient.double()
    close(y, wide @ weight.double().t() + (0 if bias is None else bias.double()), inputs)
    close(of_x, up @ weight.double(), outputs)
    close(of_values, (up.t() @ wide)[mask].view(-1, 1), num_tokens)


def close(found: Tensor, wanted: Tensor, num_terms: int) -> None:
    """Within the rounding of a sum of so many products of numbers around 1, and of the result itself."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    of_result = 2**-8 if found.dtype == torch.bfloat16 else 2**-23
    assert bool((error <= wanted.abs() * of_result + 2**-22 * (10 + num_terms)).all())


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("share", SHARES)
def test_every_size_of_a_weight(share: float, block: int) -> None:
    torch.manual_seed(0)
    for outputs, inputs in itertools.product(SIDES, SIDES):
        check(a_mask(outputs * block, inputs, share, block), 70)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("dtype", linear.DTYPES)
def test_every_number_of_tokens(block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for num_tokens, has_bias in itertools.product(TOKENS, (True, False)):
        check(a_mask(48, 37, 0.3, block), num_tokens, has_bias=has_bias, dtype=dtype)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(1040, 700), (260, 1300), (1300, 260)])
@pytest.mark.usefixtures("threads")
def test_many_tiles_slices_and_threads(outputs: int, inputs: int, block: int) -> None:
    torch.manual_seed(0)
    for num_tokens in (3, 64, 130, 320):
        check(a_mask(outputs, inputs, 0.1, block), num_tokens)


def test_the_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    mask = a_mask(300, 500, 0.1, 1)
    index, values = linear.index_of(pack(mask), mask.shape), torch.randn(int(mask.sum()), 1)
    x, gradient = torch.randn(450, 500), torch.randn(450, 300)
    found: list[tuple[Tensor | None, ...]] = []
    before = torch.get_num_threads()
    for num in (1, 2, 3, 8):
        torch.set_num_threads(num)
        both = linear.backward(gradient, x, values, index, needs_x=True, needs_values=True)
        found.append((linear.forward(x, values, index, None), *both))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True) if a is not None and b is not None)


def test_a_weight_without_live_values_gives_the_bias() -> None:
    index = linear.index_of(torch.zeros(4, dtype=torch.uint8), (4, 8))
    bias, none = torch.randn(4), torch.empty(0, 1)
    y = linear.forward(torch.randn(5, 8), none, index, bias)
    assert torch.equal(y, bias.expand(5, 4))
    both = linear.backward(y, torch.randn(5, 8), none, index, needs_x=True, needs_values=True)
    assert torch.equal(torch.cat([t.flatten() for t in both if t is not None]), torch.zeros(40))


def test_nothing_is_made_of_what_is_not_needed() -> None:
    mask = a_mask(8, 16, 0.3, 1)
    index, values = linear.index_of(pack(mask), mask.shape), torch.randn(int(mask.sum()), 1)
    x, gradient = torch.randn(5, 16), torch.randn(5, 8)
    both = linear.backward(gradient, x, values, index, needs_x=True, needs_values=True)
    one, nothing = linear.backward(gradient, x, values, index, needs_x=True, needs_values=False)
    none, other = linear.backward(gradient, x, values, index, needs_x=False, needs_values=True)
    assert nothing is None
    assert none is None
    for found, wanted in zip((one, other), both, strict=True):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)


def test_rows_that_share_their_columns_are_found_and_stored_once() -> None:
    torch.manual_seed(0)
    blocks, apart = a_mask(64, 50, 0.3, 4), a_mask(64, 50, 0.3, 1)
    of_blocks = linear.index_of(pack(blocks), blocks.shape)
    assert of_blocks.block == 4
    assert of_blocks.columns.numel() - linear.SPARE == int(blocks.sum()) // 4
    assert linear.index_of(pack(apart), apart.shape).block == 1
    blocks[5, 7] = ~blocks[5, 7]
    assert linear.index_of(pack(blocks), blocks.shape).block == 1


def test_an_index_takes_about_two_bytes_a_live_weight() -> None:
    mask = torch.rand(768, 3072, generator=torch.Generator().manual_seed(0)) < 0.1
    assert linear.index_of(pack(mask), mask.shape).nbytes < 2.5 * int(mask.sum())
