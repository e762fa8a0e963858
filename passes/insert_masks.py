"""insert-masks: a mask op behind every read of a planned weight, inside the module that owns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import gapfx.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from gapfx.compiler import Analysis, Rewrite, Unit, register
from gapfx.masks import MASK_PREFIX, num_bytes
from gapfx.owners import Owner, holders
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.passes.find_blocks import FindBlocks
from gapfx.passes.find_weights import FindWeights
from gapfx.passes.partition import Partition
from gapfx.passes.tie_weights import TieWeights

# They describe the captured model, which no rewrite of owners changes.
CAPTURE_FACTS: tuple[type[Analysis[Any]], ...] = (TieWeights, FindWeights, FindBlocks, Partition, AllocateSparsity)


@register
@dataclass(frozen=True)
class InsertMasks(Rewrite):
    """Reads of every weight of the plan, in each module that holds it, give the masked weight.

    The bits are a new buffer of the owner, all ones: every weight is kept until the runtime writes masks.
    """

    name: ClassVar[str] = "insert-masks"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = CAPTURE_FACTS

    def apply(self, unit: Unit) -> bool:
        """Whether a read was masked that was not before. Raises PlanError for a plan of another model."""
        plan = unit.latest(AllocateSparsity)
        shapes = {fqn: item.shape for item in unit.capture.parameters.values() for fqn in (item.fqn, *item.aliases)}
        plan.check_model(shapes)
        planned = {weight.fqn for weight in plan.weights()}
        places = [place for place in holders(unit.capture) if place[0] in planned]
        return any([_mask(unit, *place) for place in places])


def _mask(unit: Unit, weight: str, path: str, name: str) -> bool:
    """Mask one weight in one of its owners, or refuse it with the reason."""
    owner = unit.owners.get(path)
    if owner is None or name not in owner.names:
        unit.refuse(weight, "the recorded forward does not multiply, convolve or look up with it")
    elif hasattr(owner.parameter(name), "to_local"):
        unit.refuse(weight, "a DTensor: mask the model before it is distributed")
    else:
        return mask_read(owner, name)
    return False


def mask_read(owner: Owner, name: str) -> bool:
    """Put the op behind the read of parameter `name`; False when it is there."""
    buffer = MASK_PREFIX + name
    [read] = owner.graph.graph.find_nodes(op="get_attr", target=name)
    if owner.read(buffer) is not None:
        return False
    owner.graph.register_buffer(buffer, _ones(owner.parameter(name)), persistent=False)
    graph, users = owner.graph.graph, list(read.users)
    with graph.inserting_after(read):
        bits = graph.get_attr(buffer)
    with graph.inserting_after(bits):
        masked = graph.call_function(torch.ops.gapfx.mask.default, (read, bits))
    masked.meta["shape"] = read.meta["shape"]
    for user in users:
        user.replace_input_with(read, masked)
    return True


def _ones(weight: nn.Parameter) -> torch.Tensor:
    bits = torch.full((num_bytes(weight.numel()),), 255, dtype=torch.uint8, device=weight.device)
    if weight.numel() % 8:
        bits[-1] = (1 << weight.numel() % 8) - 1  # spare bits are 0
    return bits
