"""lower-compact: weights may be held by their live values alone; ops that make them dense take the place of masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import fx

import gapfx.ops.embedding  # noqa: F401  # pyright: ignore[reportUnusedImport]
from gapfx.compiler import Analysis, Rewrite, Unit, register
from gapfx.ops.convolution import ConvSettings, convolution
from gapfx.ops.linear import linear
from gapfx.ops.recompute import dense_again
from gapfx.passes.insert_masks import CAPTURE_FACTS

Call = tuple[Callable[..., Any], tuple[Any, ...]]
MASK = torch.ops.gapfx.mask.default
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
NAMES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
}


@register
@dataclass(frozen=True)
class LowerCompact(Rewrite):
    """Every use of a masked weight takes its values and bits, in the dense shape or as live values alone.

    Linear layers, convolutions and lookups become ops that keep nothing dense for the backward; others get the dense
    weight, made in the forward and made again in the backward. What is masked in place stays as it is.
    """

    name: ClassVar[str] = "lower-compact"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = CAPTURE_FACTS

    def apply(self, unit: Unit) -> bool:
        """Whether a mask op was replaced."""
        graphs = [owner.graph.graph for owner in unit.owners.values() if owner.form != "in-place"]
        masks = [node for graph in graphs for node in graph.find_nodes(op="call_function", target=MASK)]
        for node in masks:
            _lower(node)
        return bool(masks)


def _lower(mask: fx.Node) -> None:
    graph = mask.graph
    for user in list(mask.users):
        call = _compact_call(user, mask)
        if call is not None:
            with graph.inserting_before(user):
                user.replace_all_uses_with(graph.call_function(*call), propagate_meta=True)
            graph.erase_node(user)
    if mask.users:
        with graph.inserting_before(mask):
            dense = graph.call_function(dense_again, (*mask.args, mask.meta["shape"]))
        mask.replace_all_uses_with(dense, propagate_meta=True)
    graph.erase_node(mask)


def _compact_call(user: fx.Node, mask: fx.Node) -> Call | None:
    """The op that takes a use of a masked weight over; None where no op does."""
    named = _arguments(user)
    if named is None or named.get("weight") is not mask or list(named.values()).count(mask) > 1:
        return None
    weight, bits = mask.args
    shape = tuple(mask.meta["shape"])
    if user.target is F.linear:
        return linear, (named["input"], weight, bits, named.get("bias"), shape)
    if user.target is F.embedding and named.get("max_norm") is None and not named.get("sparse"):
        padding = named.get("padding_idx")
        place = -1 if padding is None else padding % shape[0]
        return torch.ops.gapfx.embedding.default, (
            named["input"],
            weight,
            bits,
            shape,
            place,
            bool(named.get("scale_grad_by_freq")),
        )
    settings = _settings(named, CONVOLUTIONS.get(cast(Any, user.target), 0), shape)
    if settings is None:
        return None
    return convolution, (named["input"], weight, bits, named.get("bias"), shape, tuple(settings.to_ints()))


def _arguments(user: fx.Node) -> dict[str, Any] | None:
    names = NAMES.get(user.target) if user.op == "call_function" else None
    return None if names is None else {**dict(zip(names, user.args, strict=False)), **user.kwargs}


def _settings(named: dict[str, Any], dims: int, shape: tuple[int, ...]) -> ConvSettings | None:
    """None for another function, and for a padding that is not the same on both sides."""
    if not dims:
        return None
    stride, dilation = (_each(named.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = named.get("padding", 0)
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, shape[2:], strict=True)]
        if any(number % 2 for number in total):
            return None
        padding = [number // 2 for number in total]
    padding = _each(0 if padding == "valid" else padding, dims)
    return ConvSettings(stride, padding, dilation, (0,) * dims, named.get("groups", 1))


def _each(number: Any, dims: int) -> tuple[int, ...]:
    return (number,) * dims if isinstance(number, int) else tuple(number) * (dims if len(number) == 1 else 1)
