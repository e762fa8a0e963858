"""What happens between phases: masks at the start, growing a group, pruning it back.

All functions work on whole weights that are equal on every rank, with generators seeded alike, so that every rank
computes the same masks; `check_ranks_agree` proves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.errors import AuditError, DivergedError
from gapfx.masks import count_kept, digest, pack, unpack
from gapfx.pattern import parse_pattern
from gapfx.plan import Plan, Weight
from gapfx.runtime.seeds import generator
from gapfx.runtime.shards import OptimizerState


@dataclass
class TrainState:
    """All that outlives an engine.

    weights: FQN -> whole fp32 parameter. buffers: FQN -> buffer. bits: FQN -> packed mask in force. sparse_bits: the
    mask each weight had when it was last sparse. explored: bits of weights that were live in any phase so far.
    `step` counts optimizer steps done.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    bits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    sparse_bits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    explored: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    step: int = 0


@dataclass(frozen=True)
class PrunedWeight:
    """One prune of one weight.

    `changed_bits` counts mask bits that differ from the mask before it grew; `delta2` is the relative error
    |w - w*m|^2 / |w|^2 of the prune (the delta^2 of the paper's theorem).
    """

    numel: int
    kept: int
    target: float
    changed_bits: int
    delta2: float


def start_masks(state: TrainState, plan: Plan, seed: int) -> None:
    """Mask planned weights at their target sparsity by `plan.start_masks`; masked weights become 0.

    Groups that the first phase grows start dense, as they were initialised: a mask would have zeroed them.
    """
    is_dense = set(plan.phases[0].grow if plan.phases else ())
    group_of = plan.group_of()
    for index, weight in enumerate(plan.weights()):
        if group_of[weight.fqn] in is_dense:
            mask = torch.ones(weight.shape, dtype=torch.bool)
        else:
            mask = _new_mask(state, weight, plan.start_masks, generator(seed, 0, index))
        _set_mask(state, weight, mask)
        state.explored[weight.fqn] = state.bits[weight.fqn].clone()


def grow(state: TrainState, plan: Plan, groups: Iterable[int]) -> None:
    """Make the groups dense. Their masked weights are already 0 and start to train from there."""
    for group in groups:
        for weight in plan.groups[group].weights:
            state.bits[weight.fqn] = pack(torch.ones(weight.shape, dtype=torch.bool))
            state.explored[weight.fqn] = state.bits[weight.fqn].clone()


def prune(state: TrainState, plan: Plan, groups: Iterable[int], seed: int) -> dict[str, PrunedWeight]:
    """Prune the groups to their target by `plan.criterion`: weights and optimizer moments outside the mask become 0."""
    order = {weight.fqn: index for index, weight in enumerate(plan.weights())}
    result: dict[str, PrunedWeight] = {}
    for group in groups:
        for weight in plan.groups[group].weights:
            draw = generator(seed, state.step, order[weight.fqn])
            before, value = state.sparse_bits[weight.fqn], state.weights[weight.fqn]
            mask = _new_mask(state, weight, plan.criterion, draw)
            delta2 = float(value[~mask].square().sum() / value.square().sum().clamp_min(torch.finfo(value.dtype).tiny))
            _set_mask(state, weight, mask)
            state.explored[weight.fqn] = state.explored[weight.fqn] | state.bits[weight.fqn]
            changed = count_kept(before ^ state.bits[weight.fqn])
            result[weight.fqn] = PrunedWeight(weight.numel, int(mask.sum()), weight.sparsity, changed, delta2)
    return result


def sparsity_now(state: TrainState) -> float:
    """Share of zeros over all planned weights, by the masks in force."""
    numel = sum(state.weights[fqn].numel() for fqn in state.bits)
    return 1 - sum(count_kept(bits) for bits in state.bits.values()) / numel if numel else 0.0


def explored_share(state: TrainState) -> float:
    """Share of planned weights that were live in any phase so far."""
    numel = sum(state.weights[fqn].numel() for fqn in state.explored)
    return sum(count_kept(bits) for bits in state.explored.values()) / numel if numel else 1.0


def check_zeros(state: TrainState) -> None:
    """Raise AuditError unless every masked weight is exactly 0."""
    for fqn, bits in state.bits.items():
        weight = state.weights[fqn]
        alive = int(weight[~unpack(bits, weight.shape)].count_nonzero())
        if alive:
            raise AuditError(f"{alive} pruned weights of {fqn} are not zero at step {state.step}")


def check_ranks_agree(state: TrainState) -> None:
    """Raise AuditError that names the ranks whose masks differ from rank 0's (collective)."""
    mine = digest(state.bits)
    every: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    wrong = [rank for rank, other in enumerate(every) if other != every[0]]
    if wrong:
        raise AuditError(f"masks of ranks {wrong} differ from those of rank 0 at step {state.step}")


def _new_mask(state: TrainState, weight: Weight, criterion: str, draw: torch.Generator) -> Tensor:
    score = CRITERIA[criterion](state.weights[weight.fqn], draw)
    num_nan = int(score.isnan().sum())
    if num_nan:
        raise DivergedError(
            f"{num_nan} of {score.numel()} scores of {weight.fqn} are NaN at step {state.step}",
            fix="lower the learning rate or check the data, then continue from the newest checkpoint with --resume",
        )
    return parse_pattern(weight.pattern).mask(score, weight.sparsity)


def _set_mask(state: TrainState, weight: Weight, mask: Tensor) -> None:
    state.bits[weight.fqn] = state.sparse_bits[weight.fqn] = pack(mask)
    state.weights[weight.fqn].masked_fill_(~mask, 0)
    for moments in state.optimizer.moments.values():
        moments[weight.fqn].masked_fill_(~mask, 0)
