"""Where a DeepSpeed engine keeps its fp32 weights and optimizer state, and which part of each this rank has.

Stage 0 keeps all of it on every rank. Stages 1 and 2 keep it in one flat vector a parameter group, of which each rank
has one stretch: a parameter knows the fragment of itself in it (`_hp_mapping`, None when there is none). Stage 3 cuts
every parameter evenly, the last part padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gapfx.runtime.optimizers import Numbers, put_counted
from gapfx.runtime.state import OptimizerState

Fragment = tuple[int, Tensor | None]


class Shards(Protocol):
    """How one engine stores what it trains."""

    @property
    def is_whole(self) -> bool:
        """Whether each rank has everything."""
        ...

    def fragment(self, parameter: Any, key: str | None) -> Fragment:
        """Start in the flat parameter and a writable flat view of this rank's part; key None is the fp32 weight."""
        ...

    def stored(self) -> Iterator[tuple[int, Tensor]]:
        """(parameter group, tensor that the optimizer keeps state for), in the order of groups."""
        ...


@dataclass(frozen=True)
class WholeShards:
    """Stage 0: torch's optimizer works on the parameters themselves."""

    optimizer: Any
    is_whole: bool = True

    def fragment(self, parameter: Any, key: str | None) -> Fragment:
        """All of it."""
        held = parameter.data if key is None else self.optimizer.state.get(parameter, {}).get(key)
        return 0, None if held is None else held.view(-1)

    def stored(self) -> Iterator[tuple[int, Tensor]]:
        """The parameters."""
        for index, group in enumerate(self.optimizer.param_groups):
            yield from ((index, parameter) for parameter in group["params"])


@dataclass(frozen=True)
class FlatShards:
    """Stages 1 and 2."""

    zero: Any
    is_whole: bool = False

    def fragment(self, parameter: Any, key: str | None) -> Fragment:
        """A stretch of the parameter, or none of it."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, None
        # Not by `get_hp_fragment(key)`: DeepSpeed looks that up when the first group has its state and others none.
        flat, address = self._flats()[mapping.param_group_index], mapping.hp_fragment_address
        held = flat if key is None else self.zero.optimizer.state.get(flat, {}).get(key)
        part = None if held is None else held.data.narrow(0, address.start, address.numel)
        return mapping.lp_fragment_address.start, part

    def stored(self) -> Iterator[tuple[int, Tensor]]:
        """One flat vector a group."""
        yield from enumerate(self._flats())

    def _flats(self) -> list[Tensor]:
        """Where gradients of bf16 weights add up in fp32, stage 1 is another class of DeepSpeed, with other names."""
        zero = self.zero
        has_usual = hasattr(zero, "single_partition_of_fp32_groups")
        return zero.single_partition_of_fp32_groups if has_usual else zero.fp32_groups_flat_partition


@dataclass(frozen=True)
class EvenShards:
    """Stage 3. Large groups are stored as several flat vectors."""

    zero: Any
    rank: int
    is_whole: bool = False

    def fragment(self, parameter: Any, key: str | None) -> Fragment:
        """The rank's part without padding."""
        part, group = self.zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        start, flat = part.numel() * self.rank, self.zero.fp32_partitioned_groups_flat[group]
        held = flat if key is None else self.zero.optimizer.state.get(flat, {}).get(key)
        if held is None:
            return start, None
        offset = part.storage_offset() - flat.storage_offset()
        return start, held.data.narrow(0, offset, max(0, min(part.numel(), parameter.ds_numel - start)))

    def stored(self) -> Iterator[tuple[int, Tensor]]:
        """Flat vectors with the group each belongs to."""
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            yield self.zero.sub_group_to_group_id[index], flat


def numel_of(parameter: Any) -> int:
    """Number of elements of the whole parameter, which stage 3 may have released."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def read_part(shards: Shards, parameter: Any, key: str | None) -> Tensor:
    """A flat fp32 tensor of the whole parameter on the CPU; zeros stand where this rank has nothing."""
    start, part = shards.fragment(parameter, key)
    if part is not None and part.numel() == numel_of(parameter) and part.dtype is torch.float32:
        return part.detach().cpu()
    found = torch.zeros(numel_of(parameter))
    if part is not None:
        found[start : start + part.numel()] = part.detach()
    return found


@torch.no_grad()
def write_part(shards: Shards, parameter: Any, key: str | None, values: Tensor) -> None:
    """Write this rank's part of the flat values of a whole parameter."""
    start, part = shards.fragment(parameter, key)
    if part is not None:
        part.copy_(values.flatten()[start : start + part.numel()])


def moment_names(shards: Shards, optimizer: Any) -> list[str]:
    """Names of the optimizer state that has a number for each weight; none before the first step."""
    states = [optimizer.state.get(tensor, {}) for _, tensor in shards.stored()]
    return sorted({key for state in states for key, value in state.items() if _is_moment(value)})


def scalars(shards: Shards, optimizer: Any) -> list[Numbers]:
    """For each parameter group the state of weights that is one number, and whether it is kept as a tensor."""
    found: list[Numbers] = [{} for _ in optimizer.param_groups]
    for index, tensor in shards.stored():
        for key, value in optimizer.state.get(tensor, {}).items():
            if not _is_moment(value) and value is not None:
                number = value.item() if isinstance(value, Tensor) else value
                found[index].setdefault(key, (number, isinstance(value, Tensor)))
    return found


def make_state(shards: Shards, optimizer: Any, state: OptimizerState) -> None:
    """Create the optimizer state that is otherwise made at the first step, moments at 0."""
    pairs = zip(optimizer.param_groups, state.scalars, strict=True)
    of_weights = [put_counted(group, held) for group, held in pairs]
    for index, tensor in shards.stored():
        group = optimizer.param_groups[index]
        for key, (value, is_tensor) in of_weights[index].items():
            optimizer.state[tensor][key] = (
                torch.tensor(float(value), device=_home(group, tensor)) if is_tensor else value
            )
        for key in state.moments:
            optimizer.state[tensor][key] = torch.zeros_like(tensor.data)


def _home(group: Any, tensor: Tensor) -> torch.device:
    """Where torch's optimizers keep the number of steps: beside the weight when one kernel reads both."""
    is_beside = group.get("fused") or group.get("capturable")
    return tensor.device if is_beside else torch.device("cpu")


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
