"""NaN and infinity in one place: they reach what live weights connect it to, and nothing else, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapfx.kernels import convolution as convolutions
from gapfx.kernels import linear as linears
from gapfx.ops.sparse_convolution import sparse_convolution
from gapfx.ops.sparse_linear import sparse_linear
from tests.kernels.needs import needs_kernels
from tests.ops.compact import DTYPES, Weight
from tests.ops.convolutions import settings_of

pytestmark = [
    needs_kernels,
    pytest.mark.usefixtures("level"),
    pytest.mark.parametrize("where", ["input", "gradient", "value"]),
    pytest.mark.parametrize("dtype", DTYPES),
]
BAD = (torch.nan, torch.inf, -torch.inf)
KERNEL = 3
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Product:
    """A product with a sparse weight and, by the dense weight and live products alone, the same; what both are given.

    `places` has one number of each of x, gradient and weight that meet in a sum, by "input", "gradient" and "value".
    """

    weight: Weight
    x: Tensor
    gradient: Tensor
    places: dict[str, tuple[int, ...]]
    ours: Callable[[Tensor, Tensor, Tensor], Tensor]
    theirs: Callable[[Tensor, Tensor, Tensor], Tensor]

    def found(self, bias: Tensor) -> list[Tensor]:
        """Output and gradients of input, live values and bias."""
        return gradients(self.ours, self.gradient, self.x, self.weight.values, bias)

    def wanted(self, bias: Tensor) -> list[Tensor]:
        """The same in float64."""
        found = gradients(self.theirs, *(t.double() for t in (self.gradient, self.x, self.weight.dense, bias)))
        found[2] = found[2][self.weight.mask].view(-1, 1)
        return found


def gradients(function: Callable[..., Tensor], gradient: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def live_products(weight: Weight, dense: Tensor, columns: Tensor) -> Tensor:
    """Sums over the live weights alone: of columns [batch, weights of an output, places], [batch, outputs, places]."""
    each = dense.flatten(1)[:, :, None] * columns[:, None]
    return torch.where(weight.mask.flatten(1)[:, :, None], each, 0.0).sum(2)


def a_weight(*shape: int, block: int, dtype: torch.dtype) -> Weight:
    """`block` consecutive outputs share their live inputs."""
    mask = (torch.rand(shape[0] // block, *shape[1:]) < 0.3).repeat_interleave(block, 0)
    return Weight(torch.randn(shape).to(dtype) * mask, mask)


def a_live_place(weight: Weight) -> tuple[int, ...]:
    places = weight.mask.nonzero().tolist()
    return tuple(places[len(places) // 2])


def a_linear_layer(weight: Weight, tokens: int) -> Product:
    def ours(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, values, weight.bits, bias, weight.dense.shape)

    def theirs(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
        return live_products(weight, dense, x[:, :, None])[:, :, 0] + bias

    x, gradient = (torch.randn(tokens, size).to(weight.dense.dtype) for size in reversed(weight.dense.shape))
    row, column = a_live_place(weight)
    places = {"input": (tokens // 2, column), "gradient": (tokens // 2, row), "value": (row, column)}
    return Product(weight, x, gradient, places, ours, theirs)


def a_convolution(weight: Weight, side: int, stride: int, padding: int) -> Product:
    settings, to_side = settings_of(weight, stride, padding), (side + 2 * padding - KERNEL) // stride + 1

    def ours(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_convolution(x, values, weight.bits, bias, weight.dense.shape, settings.to_ints())

    def theirs(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
        columns = F.unfold(x, KERNEL, stride=stride, padding=padding)
        return live_products(weight, dense, columns).unflatten(2, (to_side, to_side)) + bias[:, None, None]

    (row, channel, *taps), at = a_live_place(weight), to_side // 2
    x = torch.randn(2, weight.dense.shape[1], side, side).to(weight.dense.dtype)
    gradient = torch.randn(2, weight.dense.shape[0], to_side, to_side).to(weight.dense.dtype)
    read = (stride * at - padding + tap for tap in taps)
    places = {"input": (1, channel, *read), "gradient": (1, row, at, at), "value": (row, channel, *taps)}
    return Product(weight, x, gradient, places, ours, theirs)


def check(product: Product, where: str) -> None:
    """With each kind of bad number in one place of one tensor."""
    place, dtype = product.places[where], product.x.dtype
    holder = {"input": product.x, "gradient": product.gradient, "value": product.weight.dense}[where]
    bias, before = torch.randn(len(product.weight.dense)).to(dtype), holder[place].clone()
    for bad in BAD:
        holder[place] = bad
        found, wanted = product.found(bias), product.wanted(bias)
        assert any(0 < int(t.isfinite().sum()) < t.numel() for t in wanted)
        if where == "value" and product.x.dim() > 2:
            wanted[1] = with_borders(wanted[1], found[1], channel=place[1])
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=ROUNDING[dtype], atol=1e-3, equal_nan=True)
    holder[place] = before


def with_borders(of_input: Tensor, found: Tensor, channel: int) -> Tensor:
    """May be NaN wherever it is in `found` in this channel: planes of gradients have zeros around that meet the value.

    Torch's dense convolution, too, lets them meet in some settings and not in others.
    """
    is_of_channel = torch.zeros_like(found, dtype=torch.bool)
    is_of_channel[:, channel] = True
    return of_input.masked_fill(is_of_channel & found.isnan() & of_input.isfinite(), torch.nan)


@pytest.mark.parametrize("block", [1, linears.BLOCK])
def test_a_linear_layer_passes_them_through_live_weights_alone(block: int, dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    for (outputs, inputs), tokens in itertools.product(((32, 40), (20, 230)), (3, 17, 70)):
        weight = a_weight(outputs, inputs, block=block, dtype=dtype)
        assert linears.index_of(weight.bits, weight.dense.shape).block == block
        check(a_linear_layer(weight, tokens), where)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_passes_them_through_live_weights_alone(
    block: int, stride: int, padding: int, dtype: torch.dtype, where: str
) -> None:
    torch.manual_seed(0)
    for side in (5, 9):
        weight = a_weight(8, 20, KERNEL, KERNEL, block=block, dtype=dtype)
        live = convolutions.prepare(weight.bits, weight.dense.shape, 1)
        assert live.is_blocked == (block == 4)
        assert live.tiles > 1
        check(a_convolution(weight, side, stride, padding), where)
