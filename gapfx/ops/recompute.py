"""Dense weights that the backward makes again: for uses that no op of ours replaces, such as attention.

A dense weight made by `dense_again` is tied to its recipe. Inside `without_dense` autograd keeps the recipe in place of
the weight, or of any view of it, and makes the weight again when the backward asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapfx.ops.expand import dense_of


@dataclass(frozen=True)
class Recipe:
    """Live values and bits by reference: ZeRO-3 takes them away after the forward and brings them for the backward."""

    values: Tensor
    bits: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _View:
    """A tensor in the memory of a dense weight."""

    recipe: Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        recipe = self.recipe
        with torch.no_grad():
            dense = dense_of(recipe.values, recipe.bits, recipe.shape)
        return dense.as_strided(self.size, self.stride, self.offset)


def dense_again(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """As `dense_of`; inside of `without_dense` it is not kept for the backward."""
    dense = dense_of(values, bits, shape)
    if values.numel() != dense.numel() and not torch.compiler.is_compiling():
        # On the storage, which all views share, also those that autograd makes for itself.
        storage: Any = dense.untyped_storage()
        storage.gapfx_recipe = Recipe(values, bits, tuple(shape))
    return dense


def without_dense() -> Any:
    """Context manager for a forward whose dense weights are not kept."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | _View:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return tensor
    recipe: Recipe | None = getattr(tensor.untyped_storage(), "gapfx_recipe", None)
    if recipe is None or tensor.dtype != recipe.values.dtype:
        return tensor
    return _View(recipe, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.make() if isinstance(kept, _View) else kept
