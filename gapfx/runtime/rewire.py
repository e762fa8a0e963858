"""Drop and regrow: at a phase's start weights exchange their weakest live values for masked ones (SET, RigL)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.masks import count_kept, unpack
from gapfx.pattern import SlicedPattern, parse_pattern
from gapfx.plan import Weight
from gapfx.runtime.exchange import take_state
from gapfx.runtime.grow_prune import grow, set_mask
from gapfx.runtime.seeds import generator
from gapfx.runtime.select import top_of_slices
from gapfx.runtime.state import OptimizerState, TrainState, bytes_of, dense_slice
from gapfx.runtime.steps import PhaseRun, descend, open_engine


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
    before = bytes_of(state.bits[fqn], *state.bounds(fqn)).clone()
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


def dense_gradients(run: PhaseRun, state: TrainState) -> dict[str, Tensor]:
    """Flat fp32 gradient of this rank's slice of each planned weight, masked places too (collective).

    By a step of plain SGD with a learning rate of 1, on the batch that the next step trains on, in an engine that holds
    all weights dense: what it takes from a masked weight, which is 0, is the gradient to the bit, at any ZeRO stage.
    For a moment it takes the memory of a dense model. The state stays as it is.
    """
    groups = range(len(run.job.plan.groups))
    job = replace(run.job, optimizer=_plain_descent, engine=replace(run.job.engine, clip=0.0))
    probe = replace(
        state,
        weights=dict(state.weights),
        bits=dict(state.bits),
        explored=dict(state.explored),
        optimizer=OptimizerState(),
    )
    grow(probe, job.plan, groups)
    engine = open_engine(replace(run, job=job), probe)
    try:
        descend(run, engine, state.step)
        take_state(engine, probe, is_last=True, with_optimizer=False)
    finally:
        engine.close()
    planned = [weight.fqn for weight in job.plan.weights()]
    return {fqn: dense_slice(state, state.weights, fqn) - probe.weights[fqn] for fqn in planned}


def _plain_descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)
