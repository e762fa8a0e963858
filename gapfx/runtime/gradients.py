"""Gradients of weights as if they were dense: what RigL regrows by, and what criteria of gradients score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gapfx.runtime.exchange import take_state
from gapfx.runtime.grow_prune import grow
from gapfx.runtime.state import OptimizerState, TrainState, dense_slice
from gapfx.runtime.steps import PhaseRun, descend, open_engine


def dense_gradients(run: PhaseRun, state: TrainState, groups: Iterable[int]) -> dict[str, Tensor]:
    """Flat fp32 gradient of this rank's slice of each weight of the groups, masked places too (collective).

    By a step of plain SGD with a learning rate of 1, on the batch that the next step trains on, in an engine that holds
    these groups dense: what it takes from a masked weight, which is 0, is the gradient to the bit, at any ZeRO stage.
    The memory is that of a phase in which they grow. The state stays as it is.
    """
    groups = tuple(groups)
    job = replace(run.job, optimizer=_plain_descent, engine=replace(run.job.engine.beside_flags(), clip=0.0))
    probe = replace(
        state,
        weights=dict(state.weights),
        bits=dict(state.bits),
        lives=dict(state.lives),
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
    planned = [weight.fqn for group in groups for weight in job.plan.groups[group].weights]
    return {fqn: dense_slice(state, state.weights, fqn) - probe.weights[fqn] for fqn in planned}


def _plain_descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)
