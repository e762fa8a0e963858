"""fold-masks: takes the mask ops out again and leaves their zeros in the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gapfx.compiler import Analysis, Rewrite, Unit, register
from gapfx.masks import MASK_PREFIX, mask_home, unpack
from gapfx.owners import Owner
from gapfx.passes.insert_masks import CAPTURE_FACTS


@register
@dataclass(frozen=True)
class FoldMasks(Rewrite):
    """A graph without mask ops whose parameters are exactly 0 wherever a mask was."""

    name: ClassVar[str] = "fold-masks"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = CAPTURE_FACTS

    def apply(self, unit: Unit) -> bool:
        """Whether there was a mask."""
        return any([_fold(unit.capture.model, owner, name) for owner in unit.owners.values() for name in owner.names])


@torch.no_grad()
def _fold(model: nn.Module, owner: Owner, name: str) -> bool:
    buffer = MASK_PREFIX + name
    node = owner.read(buffer)
    if node is None:
        return False
    home, held = mask_home(model, f"{owner.fqn}.{name}" if owner.fqn else name)
    # The module's own bits when it has been realised, else those in the graph.
    bits = vars(home)["_buffers"].get(held, getattr(owner.graph, buffer))
    weight = owner.parameter(name)
    weight.masked_fill_(~unpack(bits, weight.shape), 0)
    for masked in list(node.users):
        masked.replace_all_uses_with(masked.all_input_nodes[0])
        owner.graph.graph.erase_node(masked)
    owner.graph.graph.erase_node(node)
    delattr(owner.graph, buffer)
    return True
