"""Masks of a module that an engine trains: whole on every rank, or cut over ranks like the values beside them.

At ZeRO 3 the packed mask of a weight is a uint8 parameter without a gradient, of the module that holds the weight:
DeepSpeed cuts it, gathers it for the forward and the backward of that module, and releases it, as it does with values.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gapfx.masks import MASK_PREFIX, bits_of, mask_home, split_fqn
from gapfx.plan import Weight

Place = Callable[[nn.Parameter], None]


def put_bits(module: nn.Module, weight: Weight, bits: Tensor, place: Place | None) -> None:
    """Give a weight, by all its names, its packed mask: as buffers, or with `place` as one parameter that it cuts."""
    found = [mask_home(module, fqn) for fqn in (weight.fqn, *weight.aliases)]
    homes = list(
        {(id(home), name): (home, name) for home, name in found}.values()
    )  # a module may have two names itself
    for home, name in homes:
        delattr(home, name)
    if place is None:
        for home, name in homes:
            home.register_buffer(name, bits.clone(), persistent=False)
        return
    held = nn.Parameter(bits.clone(), requires_grad=False)
    place(held)
    for home, name in homes:
        home.register_parameter(name, held)


@contextmanager
def whole_bits_of(module: nn.Module, fqn: str) -> Generator[Tensor]:
    """The packed mask that a module has for a weight, meanwhile whole on each rank (collective where it is cut)."""
    held = bits_of(module, fqn)
    if not hasattr(held, "ds_id"):
        yield held
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([held]):
        yield held.detach()


def without_bits(module: nn.Module) -> dict[int, Tensor]:
    """For a deep copy: the id of each mask buffer of the module -> an empty one, in its place."""
    found = {id(buffer): buffer for fqn, buffer in module.named_buffers() if split_fqn(fqn)[1].startswith(MASK_PREFIX)}
    return {key: torch.empty(0, dtype=buffer.dtype) for key, buffer in found.items()}
