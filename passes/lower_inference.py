"""lower-inference: layers whose weights never change again take the kernels of inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from gapfx.compiler import Analysis, Rewrite, Unit, register
from gapfx.ops.convolution import convolution
from gapfx.ops.fixed_linear import fixed_linear
from gapfx.ops.linear import linear
from gapfx.ops.sparse_convolution import refusal, sparse_convolution
from gapfx.owners import Owner
from gapfx.passes.insert_masks import CAPTURE_FACTS


@register
@dataclass(frozen=True)
class LowerInference(Rewrite):
    """Compact linear layers and convolutions run on kernels that read live values alone; after `lower-compact`.

    Those of linear layers know no gradient. Convolutions without a kernel stay as they are, and a refusal says why.
    """

    name: ClassVar[str] = "lower-inference"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = CAPTURE_FACTS

    def apply(self, unit: Unit) -> bool:
        """Whether a layer was found."""
        changed = False
        for owner in unit.owners.values():
            for node in _calls(owner, linear):
                node.target, changed = fixed_linear, True
            for node in _calls(owner, convolution):
                shape, settings = cast(tuple[tuple[int, ...], tuple[int, ...]], node.args[4:6])
                reason = refusal(shape, settings, _weight(owner, node).dtype)
                if reason:
                    unit.refusals.append((owner.fqn, reason))
                else:
                    node.target, changed = sparse_convolution, True
        return changed


def _calls(owner: Owner, target: Any) -> Iterator[fx.Node]:
    found = () if owner.form == "in-place" else owner.graph.graph.find_nodes(op="call_function", target=target)
    yield from found


def _weight(owner: Owner, node: fx.Node) -> torch.Tensor:
    return owner.parameter(str(cast(fx.Node, node.args[1]).target))


def served(unit: Unit) -> dict[str, str]:
    """FQN of each stored weight in each owner -> what all of its uses are: "linear", "convolution", "dense" or ""."""
    kinds: dict[Any, str] = {fixed_linear: "linear", sparse_convolution: "convolution"}
    found: dict[str, str] = {}
    for owner in unit.owners.values():
        for name in owner.names:
            read = owner.read(name)
            users = set[Any]() if read is None else {kinds.get(user.target, "dense") for user in read.users}
            fqn = f"{owner.fqn}.{name}" if owner.fqn else name
            found[fqn] = "dense" if owner.form == "in-place" or len(users) > 1 else next(iter(users), "")
    return found
