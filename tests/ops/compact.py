"""Compact weights beside masked ones, for tests of ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapfx.masks import pack
from gapfx.ops.mask import mask as masked

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """One weight: dense with zeros, and its mask with at least one live place."""

    dense: Tensor
    mask: Tensor

    @property
    def bits(self) -> Tensor:
        return pack(self.mask)

    @property
    def values(self) -> Tensor:
        """The live values as one column."""
        return self.dense[self.mask].view(-1, 1)


def a_weight(*shape: int, dtype: torch.dtype = torch.float32, share: float = 0.4) -> Weight:
    mask = torch.rand(shape) < share
    mask.view(-1)[0] = True
    return Weight(torch.randn(shape).to(dtype) * mask, mask)


def run(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of every floating input."""
    given = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    output = function(*given)
    output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_bitwise(
    weight: Weight, compact: Callable[..., Tensor], dense: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """`compact(values, *inputs)` gives what `dense(masked weight, *inputs)` gives, outputs and gradients to the bit."""
    bits = weight.bits
    ours = run(compact, weight.values, *inputs)
    theirs = run(lambda w, *rest: dense(masked(w, bits), *rest), weight.dense, *inputs)
    theirs[1] = theirs[1][weight.mask].view(-1, 1)
    for one, other in zip(ours, theirs, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def bytes_kept(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd saves while `function` runs, each storage once."""
    storages: dict[int, int] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        function()
    return sum(storages.values())
