"""Gradients of weights as if they were dense: what RigL regrows by, and what criteria of gradients score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gapfx.runtime.exchange import take_state
from gapfx.runtime.grow_prune import grow
from gapfx.runtime.state import OptimizerState, TrainState
from gapfx.runtime.steps import PhaseRun, descend, open_engine


def dense_gradients(run: PhaseRun, state: TrainState, groups: Iterable[int]) -> dict[str, Tensor]:
    """Flat fp32 gradient of this rank's slice of each weight of the groups, masked places too (collective).

    By a step on the batch that the next step trains on, in an engine that holds these groups dense and whose optimizer
    puts gradients in the place of weights: so they come back to the bit, however small beside the weight, at any ZeRO
    stage; a frozen weight has 0. The memory is that of a phase in which they grow. The state stays as it is.
    """
    groups = tuple(groups)
    job = replace(run.job, optimizer=_Reveal, engine=replace(run.job.engine.beside_flags(), clip=0.0))
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
    trained = frozenset(engine.trained)
    try:
        descend(run, engine, state.step)
        take_state(engine, probe, is_last=True, with_optimizer=False)
    finally:
        engine.close()
    planned = [weight.fqn for group in groups for weight in job.plan.groups[group].weights]
    found = {fqn: probe.weights[fqn] for fqn in planned}
    return {fqn: value if fqn in trained else torch.zeros_like(value) for fqn, value in found.items()}


class _Reveal(torch.optim.Optimizer):
    """Its step makes every parameter its own gradient, 0 where it has none."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.zero_() if parameter.grad is None else parameter.copy_(parameter.grad)
