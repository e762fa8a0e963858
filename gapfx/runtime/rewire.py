"""Drop and regrow: at a phase's start weights exchange their weakest live values for masked ones (SET, RigL)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.masks import count_kept, pack, unpack
from gapfx.pattern import SlicedPattern, parse_pattern
from gapfx.plan import Weight
from gapfx.runtime.gradients import dense_gradients
from gapfx.runtime.grow_prune import check_scores, set_mask
from gapfx.runtime.seeds import generator
from gapfx.runtime.select import top_of_slices
from gapfx.runtime.state import TrainState, dense_slice
from gapfx.runtime.steps import PhaseRun


def rewire(run: PhaseRun, state: TrainState) -> int:
    """Exchange the phase's share of the live values of each weight that does not grow; mask bits changed (collective).

    Of each weight as many stay live as were. What is dropped may come back at once, and keeps its value then, as in the
    code of RigL's authors; all other regrown weights start at 0, without moments.
    """
    fresh: dict[str, Tensor] = {}
    for number in range(len(run.job.plan.groups)):
        if number not in run.phase.grow:
            fresh |= _fresh_masks(run, state, number)
    return sum(_exchange(state, fqn, bits) for fqn, bits in fresh.items())


def _fresh_masks(run: PhaseRun, state: TrainState, number: int) -> dict[str, Tensor]:
    """Packed masks that the weights of a group shall have; the state stays as it is, to score every group alike.

    Group by group, so that gradients of dense weights take no more memory than a phase in which the group grows.
    """
    gradients = dense_gradients(run, state, [number]) if run.phase.regrow == "gradient" else None
    order = {weight.fqn: index for index, weight in enumerate(run.job.plan.weights())}
    fresh: dict[str, Tensor] = {}
    for weight in run.job.plan.groups[number].weights:
        draw = generator(run.job.seed, state.step, order[weight.fqn])
        score = gradients[weight.fqn].abs() if gradients else _random_score(state, weight, draw)
        fresh[weight.fqn] = pack(_rewired(state, weight, run.phase.drop, score))
    return fresh


def _rewired(state: TrainState, weight: Weight, drop: float, score: Tensor) -> Tensor:
    """Flat mask of this rank's slice (collective)."""
    if score.is_floating_point():
        check_scores(score, weight.fqn, state, state.peers)
    num_live = state.num_live(weight.fqn)
    is_live = unpack(state.bits[weight.fqn], score.shape)
    magnitude = dense_slice(state, state.weights, weight.fqn).abs().masked_fill(~is_live, -1)
    kept = _highest(state, weight, magnitude, num_live - math.floor(drop * num_live))
    # Above every place in the order; blocks add them up.
    above = math.inf if score.is_floating_point() else weight.numel
    return _highest(state, weight, score.masked_fill(kept, above), num_live)


def _exchange(state: TrainState, fqn: str, own: Tensor) -> int:
    """Put a packed mask in force; how many of its bits differ from those before (collective)."""
    before, (start, stop) = state.bits[fqn], state.bounds(fqn)
    set_mask(state, fqn, unpack(own, (stop - start,)))
    state.explored[fqn] = state.explored[fqn] | own
    return int(state.peers.total(torch.tensor(count_kept(before ^ own))))


def _highest(state: TrainState, weight: Weight, score: Tensor, num: int) -> Tensor:
    """Flat mask of this rank's slice, of the weight's pattern: `num` live in all slices (collective)."""
    pattern = parse_pattern(weight.pattern)
    assert isinstance(pattern, SlicedPattern)  # see check_prunes
    top = partial(top_of_slices, peers=state.peers)
    return pattern.mask_slice(score, weight.shape, 1 - num / weight.numel, top)


def _random_score(state: TrainState, weight: Weight, draw: torch.Generator) -> Tensor:
    """Flat, of this rank's slice: the same order of the whole weight on any number of ranks."""
    start, stop = state.bounds(weight.fqn)
    return CRITERIA["random"](torch.empty(weight.shape), draw).flatten()[start:stop]
