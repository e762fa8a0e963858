"""find-roles: weights that play the same part in their blocks, such as every q of a Transformer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gapfx.block_flow import BlockFlow
from gapfx.capture import Capture
from gapfx.compiler import Analysis, Unit, register
from gapfx.passes.find_blocks import Block, FindBlocks

# What nn.MultiheadAttention calls its weights; it shows no op for each of its products.
OF_ATTENTION = {"in_proj_weight": "qkv", "q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


@dataclass(frozen=True)
class Role:
    """Weights in execution order that share a part, and its name: see `FindRoles`."""

    name: str
    weights: tuple[str, ...]


@register
@dataclass(frozen=True)
class FindRoles(Analysis[tuple[Role, ...]]):
    """Roles of the weights of repeated blocks; each of these weights has one.

    Data flow names them first. In an attention, q and k are the weights whose products are multiplied with each other,
    v the one that the softmax of that weighs ("qkv" and the like where one weight makes several), o the one that takes
    the result. Of the other linear weights of a block, up is one that widens, is fed by none and feeds one alone; down
    is one that is fed by such weights alone: a gated product has two that are up. What flow does not name is called by
    its place in the block.
    """

    name: ClassVar[str] = "find-roles"

    def compute(self, unit: Unit) -> tuple[Role, ...]:
        """Roles by the first of their weights."""
        blocks = [block for block in unit.latest(FindBlocks) if block.is_repeated]
        flow = BlockFlow(unit.capture, {fqn: block.name for block in blocks for fqn in block.weights})
        attention = flow.attention() | dict(_own_attention(unit.capture))
        roles: dict[str, list[str]] = {}
        for block in blocks:
            known = attention | _up_and_down(flow, [fqn for fqn in block.weights if fqn not in attention])
            for place, fqn in enumerate(block.weights):
                roles.setdefault(known.get(fqn) or _place(block, fqn, place), []).append(fqn)
        return tuple(Role(name, tuple(fqns)) for name, fqns in roles.items())


def _own_attention(capture: Capture) -> Iterator[tuple[str, str]]:
    for use in capture.uses:
        if use.fn.startswith("multi_head_attention") and use.role == "gemm":
            yield use.fqn, OF_ATTENTION.get(use.fqn.rpartition(".")[2], "o")


def _up_and_down(flow: BlockFlow, fqns: Sequence[str]) -> dict[str, str]:
    """Roles of the weights of one block that feed each other in one step; longer chains have none."""
    feeds = {fqn: flow.feeds(fqn) - {fqn} for fqn in fqns}
    ends = {fqn for fqn in fqns if flow.is_linear(fqn) and not feeds[fqn]}
    linear = [fqn for fqn in fqns if flow.is_linear(fqn) and flow.widens(fqn)]
    fed = set[str]().union(*feeds.values())
    ups = {fqn for fqn in linear if len(feeds[fqn]) == 1 and feeds[fqn] <= ends and fqn not in fed}
    feeders = {end: {fqn for fqn, fed in feeds.items() if end in fed} for end in ends}
    downs = {end for end, found in feeders.items() if found and found <= ups}
    return dict.fromkeys(downs, "down") | {fqn: "up" for fqn in ups if feeds[fqn] <= downs}


def _place(block: Block, fqn: str, place: int) -> str:
    """The name within the block; the number of the weight in a block that is no module."""
    if fqn.startswith(f"{block.name}."):
        return fqn.removeprefix(f"{block.name}.").removesuffix(".weight")
    layer = re.search(r"([^.]*)_l\d+(_reverse)?$", fqn)
    return f"{layer[1]}{layer[2] or ''}" if layer else f"weight {place}"
