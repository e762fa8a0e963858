"""Masks at one bit a weight, and where they sit in a masked module.

Polarity: True (bit 1) = kept. Bit `i` of byte `b` is flat weight `8 b + i` (least significant bit first). The bits
of parameter `name` are the non-persistent buffer `_gapfx_mask_<name>` of the module that owns the parameter. A
ScriptModule takes no buffers: bits of `child.name` in it are `_gapfx_mask_<child>:<name>` of the module around it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.kernels import native

MASK_PREFIX = "_gapfx_mask_"


@cache
def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


@cache
def _bytes_as_bools(device: torch.device) -> Tensor:
    """Row v holds the 8 bools of byte v, viewed as one int64 so that unpacking is a single gather."""
    value = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    return (value & _bit_values(device)).ne(0).view(torch.int64).flatten()


def num_bytes(numel: int) -> int:
    """Bytes of the packed mask of `numel` weights."""
    return (numel + 7) // 8


def pack(mask: Tensor) -> Tensor:
    """Bool mask of any shape -> uint8 bits, shape [ceil(numel / 8)]; spare bits are 0."""
    if native.can_pack(mask):
        bits = mask.new_empty(num_bytes(mask.numel()), dtype=torch.uint8)
        native.pack(mask.bool().contiguous(), bits)
        return bits
    flat = F.pad(mask.detach().flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * _bit_values(mask.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """Packed uint8 bits -> bool mask of `shape`."""
    size = tuple(shape)
    if native.can_pack(bits) and bits.is_contiguous():
        mask = bits.new_empty(size, dtype=torch.bool)
        native.unpack(bits[: num_bytes(mask.numel())], mask)
        return mask
    bools = _bytes_as_bools(bits.device)[bits.int()].view(torch.bool)
    return bools[: math.prod(size)].view(size)


def fill_masked(weight: Tensor, mask: Tensor) -> None:
    """Write exact zeros into a weight where a bool mask of its shape drops; a DTensor takes its shard of the mask.

    The mask must be equal on all ranks; for a DTensor each of them calls.
    """
    dropped = ~mask.to(weight.device)
    if hasattr(weight, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = weight
        dropped = distribute_tensor(dropped, sharded.device_mesh, sharded.placements)
    with torch.no_grad():
        weight.masked_fill_(dropped, 0)


def count_kept(bits: Tensor) -> int:
    """Number of 1 bits."""
    if native.can_pack(bits) and bits.is_contiguous():
        return native.count(bits, bits.numel() * 8)
    return int(unpack(bits, (bits.numel() * 8,)).sum())


class Masks(Mapping[str, Tensor]):
    """FQN -> bool mask of the weight's shape, True = kept, unpacked from the module's bits at each look-up."""

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._module, self._shapes = module, dict(shapes)

    def __getitem__(self, fqn: str) -> Tensor:
        shape = self._shapes[fqn]
        return unpack(bits_of(self._module, fqn), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def digest(masks: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over FQNs and packed bits, in the order in which they come."""
    total = hashlib.sha256()
    for fqn, mask in masks:
        bits = mask.cpu().numpy().tobytes()
        # With the lengths, no two sets of masks are the same stream of bytes.
        total.update(f"{len(fqn)} {fqn} {len(bits)} ".encode() + bits)
    return total.hexdigest()


def split_fqn(fqn: str) -> tuple[str, str]:
    """`a.b.weight` -> (`a.b`, `weight`): the owner's FQN and the parameter's name in it."""
    owner, _, name = fqn.rpartition(".")
    return owner, name


def stored_parameter(module: nn.Module, fqn: str) -> nn.Parameter:
    """The parameter itself; `get_parameter` refuses where reading the attribute gives the masked weight."""
    owner, name = split_fqn(fqn)
    return cast(nn.Parameter, vars(module.get_submodule(owner))["_parameters"][name])


def mask_home(module: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The module that holds the bits of parameter `fqn`, and the name of the buffer there."""
    path, name = split_fqn(fqn)
    home = module.get_submodule(path)
    while path and isinstance(home, torch.jit.ScriptModule):
        path, child = split_fqn(path)
        home, name = module.get_submodule(path), f"{child}:{name}"
    return home, MASK_PREFIX + name


def bits_of(module: nn.Module, fqn: str) -> Tensor:
    """The packed mask buffer of parameter `fqn`; raises AttributeError when it has no mask."""
    home, name = mask_home(module, fqn)
    return cast(Tensor, getattr(home, name))


def write_bits(module: nn.Module, fqn: str, bits: Tensor) -> None:
    """Copy packed bits into the mask buffer of parameter `fqn`, in place."""
    bits_of(module, fqn).copy_(bits)
