"""Reading and writing whole fp32 weights and optimizer state through DeepSpeed's ZeRO shards.

ZeRO 1 and 2 keep the fp32 master weights and the optimizer state of a rank in one flat vector a parameter group; each
parameter knows the fragment of itself that this rank holds (`_hp_mapping`, None when it holds nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Scalar = float | int


@dataclass
class OptimizerState:
    """Optimizer state of a whole model, free of shards.

    `moments` maps a state's name (`exp_avg`) to FQN -> fp32 tensor of the parameter's shape; `scalars` holds, for each
    parameter group, the states that are one number (`step`) and whether the optimizer keeps it as a tensor.
    """

    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    scalars: list[dict[str, tuple[Scalar, bool]]] = field(default_factory=list[dict[str, tuple[Scalar, bool]]])


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO manages this parameter (a frozen one it does not)."""
    return hasattr(parameter, "_hp_mapping")


def fragment(parameter: Any, key: str | None) -> tuple[int, Tensor | None]:
    """Start in the flattened parameter and a writable view of this rank's part; key None is the fp32 weight."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)


@torch.no_grad()
def gather(parameter: Tensor, key: str | None, group: Any) -> Tensor:
    """The whole fp32 weight or optimizer state of one parameter, on the CPU of every rank (collective)."""
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    start, part = fragment(parameter, key)
    if part is not None:
        whole[start : start + part.numel()] = part
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(whole, group=group)
    return whole.view(parameter.shape).cpu()


@torch.no_grad()
def scatter(parameter: Tensor, key: str | None, whole: Tensor) -> None:
    """Write this rank's part of a whole fp32 weight or optimizer state."""
    start, part = fragment(parameter, key)
    if part is not None:
        part.copy_(whole.flatten()[start : start + part.numel()])


def read_weights(module: nn.Module, group: Any) -> dict[str, Tensor]:
    """FQN -> whole fp32 parameter on the CPU, the same on every rank (collective)."""
    return {
        fqn: gather(parameter, None, group) if is_sharded(parameter) else parameter.detach().float().cpu().clone()
        for fqn, parameter in module.named_parameters()
    }


def write_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write the fp32 master weights; bf16 initialisation alone would have rounded them."""
    for fqn, parameter in module.named_parameters():
        if is_sharded(parameter):
            scatter(parameter, None, weights[fqn])


def read_optimizer(module: nn.Module, zero: Any, group: Any) -> OptimizerState:
    """The optimizer state of the whole model (collective); empty before the first step."""
    flats, inner = zero.single_partition_of_fp32_groups, zero.optimizer
    names = sorted({key for flat in flats for key, value in inner.state.get(flat, {}).items() if _is_moment(value)})
    moments = {
        key: {fqn: gather(p, key, group) for fqn, p in module.named_parameters() if is_sharded(p)} for key in names
    }
    scalars = [
        {
            key: (value.item() if isinstance(value, Tensor) else value, isinstance(value, Tensor))
            for key, value in inner.state.get(flat, {}).items()
            if not _is_moment(value) and value is not None
        }
        for flat in flats
    ]
    return OptimizerState(moments, scalars)


def write_optimizer(module: nn.Module, zero: Any, state: OptimizerState) -> None:
    """Create the optimizer state that ZeRO makes at the first step, and fill it."""
    if not state.moments and not any(state.scalars):
        return
    inner = zero.optimizer
    for flat, scalars in zip(zero.single_partition_of_fp32_groups, state.scalars, strict=True):
        for key, (value, is_tensor) in scalars.items():
            inner.state[flat][key] = torch.tensor(float(value)) if is_tensor else value
        for key in state.moments:
            inner.state[flat][key] = torch.zeros_like(flat.data)
    zero._lazy_init_hp_params_optimizer_state()
    for key, whole in state.moments.items():
        for fqn, parameter in module.named_parameters():
            if is_sharded(parameter):
                scatter(parameter, key, whole[fqn])


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
