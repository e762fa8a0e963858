"""Drop and regrow: at a phase's start weights exchange their weakest live values for masked ones (SET, RigL)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.masks import count_kept, unpack
from gapfx.pattern import SlicedPattern, parse_pattern
from gapfx.plan import Weight
from gapfx.runtime.gradients import dense_gradients
from gapfx.runtime.grow_prune import set_mask
from gapfx.runtime.seeds import generator
from gapfx.runtime.select import top_of_slices
from gapfx.runtime.state import TrainState, dense_slice
from gapfx.runtime.steps import PhaseRun


def rewire(run: PhaseRun, state: TrainState) -> int:
    """Exchange the phase's share of the live values of each weight that does not grow; mask bits changed (collective).

    Of each weight as many stay live as were. What is dropped may come back at once, and keeps its value then, as in the
    code of RigL's authors; all other regrown weights start at 0, without moments.
    """
    plan, phase, changed = run.job.plan, run.phase, 0
    gradients = dense_gradients(run, state) if phase.regrow == "gradient" else None
    group_of = plan.group_of()
    for index, weight in enumerate(plan.weights()):
        if group_of[weight.fqn] in phase.grow:
            continue
        draw = generator(run.job.seed, state.step, index)
        score = gradients[weight.fqn].abs() if gradients else _random_score(state, weight, draw)
        changed += _rewire(state, weight, phase.drop, score)
    return changed


def _rewire(state: TrainState, weight: Weight, drop: float, score: Tensor) -> int:
    fqn, num_live = weight.fqn, state.num_live(weight.fqn)
    before = state.bits[fqn]
    is_live = unpack(before, score.shape)
    magnitude = dense_slice(state, state.weights, fqn).abs().masked_fill(~is_live, -1)
    kept = _highest(state, weight, magnitude, num_live - math.floor(drop * num_live))
    above = (
        math.inf if score.is_floating_point() else weight.numel
    )  # above every place in the order; blocks add them up
    set_mask(state, fqn, _highest(state, weight, score.masked_fill(kept, above), num_live))
    own = state.sparse_bits[fqn]
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
