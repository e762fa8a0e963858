"""The run: phase after phase of grow, train, prune, with checkpoints, from the start or from a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.errors import DivergedError, Interrupted
from gapfx.masks import write_bits
from gapfx.plan import Phase, Plan
from gapfx.runtime.checkpoint import checkpoint_name, save_checkpoint
from gapfx.runtime.engine import Engine, EngineOptions, LossFunction, OptimizerFactory, buffers_of, local_device
from gapfx.runtime.feed import Feed, to_model
from gapfx.runtime.grow_prune import (
    TrainState,
    check_ranks_agree,
    check_zeros,
    explored_share,
    grow,
    prune,
    sparsity_now,
    start_masks,
)
from gapfx.runtime.learning_rate import LrFactor, factor_at, warmup_cosine
from gapfx.runtime.ranks import on_rank_0
from gapfx.runtime.shards import OptimizerState
from gapfx.runtime.skeleton import module_from, skeleton_of

Event = dict[str, Any]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Pace:
    """How many steps lie between log lines, evaluations and checkpoints; 0 = only at phase ends."""

    log: int = 10
    evaluate: int = 0
    checkpoint: int = 0
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class Job:
    """What to train and how. `emit` receives events on every rank; `should_stop` is asked after every step."""

    plan: Plan
    module: nn.Module
    feed: Feed
    loss: LossFunction
    optimizer: OptimizerFactory
    engine: EngineOptions
    checkpoints: Path
    evaluate: Evaluate | None = None
    lr: LrFactor = warmup_cosine
    pace: Pace = field(default_factory=Pace)
    seed: int = 0
    emit: Callable[[Event], None] = lambda event: None
    should_stop: Callable[[], bool] = lambda: False


def initial_state(job: Job) -> TrainState:
    """Weights of the module as it was built, masked by the plan's start masks, at step 0."""
    weights = {fqn: p.detach().float().cpu().clone() for fqn, p in job.module.named_parameters()}
    state = TrainState(weights, {fqn: b.detach().clone() for fqn, b in buffers_of(job.module)})
    start_masks(state, job.plan, job.seed)
    return state


def train(job: Job, state: TrainState) -> TrainState:
    """The state after the last phase. `state` is the initial one or that of a checkpoint; it is changed in place.

    Raises Interrupted after a checkpoint when `should_stop` says so on any rank, DivergedError on a loss that is not
    finite, AuditError when ranks disagree or a pruned weight is not zero.
    """
    skeleton, began = skeleton_of(job.module), time.monotonic()
    for index, phase in enumerate(job.plan.phases):
        if state.step < phase.stop:
            _run_phase(_PhaseRun(job, skeleton, index, phase, began), state)
    return state


@dataclass(frozen=True)
class _PhaseRun:
    job: Job
    skeleton: nn.Module
    index: int
    phase: Phase
    began: float

    def emit(self, event: str, step: int, **facts: Any) -> None:
        self.job.emit({"event": event, "step": step, "phase": self.index, **facts})


def _run_phase(run: _PhaseRun, state: TrainState) -> None:
    job, phase = run.job, run.phase
    if state.step == phase.start:
        _enter(run, state)
    check_ranks_agree(state)
    engine = _open(run, state)
    try:
        _train_steps(run, engine, state)
        _snapshot(engine, state)
    finally:
        engine.close()
    check_zeros(state)
    _leave(run, state)
    check_ranks_agree(state)
    if phase.prune:
        _evaluate(run, build_module(job.plan, run.skeleton, state), state)
    _checkpoint(run, state)


def _enter(run: _PhaseRun, state: TrainState) -> None:
    phase, plan = run.phase, run.job.plan
    if phase.state == "reset":
        state.optimizer = OptimizerState()
    grow(state, plan, phase.grow)
    facts = {"grow": _names(plan, phase.grow), "prune": _names(plan, phase.prune), "sparsity": sparsity_now(state)}
    run.emit("phase", state.step, name=phase.name, round=phase.round, stop=phase.stop, **facts)


def _leave(run: _PhaseRun, state: TrainState) -> None:
    plan, groups = run.job.plan, run.phase.prune
    pruned = prune(state, plan, groups, run.job.seed)
    if groups:
        weights = {fqn: dataclasses.asdict(facts) for fqn, facts in pruned.items()}
        explored = explored_share(state)
        run.emit("prune", state.step, groups=_names(plan, groups), weights=weights, explored=explored)


def _names(plan: Plan, groups: tuple[int, ...]) -> list[str]:
    return [plan.groups[group].name for group in groups]


def build_module(plan: Plan, skeleton: nn.Module, state: TrainState) -> nn.Module:
    """A fresh masked module in fp32 that holds the state, on this rank's device."""
    module = module_from(skeleton, state.weights, local_device())
    with torch.no_grad():
        for fqn, buffer in buffers_of(module):
            buffer.copy_(state.buffers[fqn])
        for weight in plan.weights():
            for fqn in (weight.fqn, *weight.aliases):
                write_bits(module, fqn, state.bits[weight.fqn])
    return module


def _open(run: _PhaseRun, state: TrainState) -> Engine:
    engine = Engine(build_module(run.job.plan, run.skeleton, state), run.job.optimizer, run.job.engine)
    engine.load_optimizer_state(state.optimizer)
    engine.module.train()
    return engine


def _snapshot(engine: Engine, state: TrainState) -> None:
    for _, buffer in buffers_of(engine.module):
        _average_over_ranks(buffer)
    state.weights = engine.weights()
    state.buffers = {fqn: buffer.detach().cpu().clone() for fqn, buffer in buffers_of(engine.module)}
    state.optimizer = engine.optimizer_state()


def _average_over_ranks(buffer: Tensor) -> None:
    """Running statistics differ between ranks that saw different samples: their mean is the model's.

    In place, so that a run goes on from exactly what its checkpoint holds.
    """
    world_size = torch.distributed.get_world_size()
    if world_size > 1 and buffer.is_floating_point() and buffer.numel():
        torch.distributed.all_reduce(buffer)
        buffer /= world_size


def _train_steps(run: _PhaseRun, engine: Engine, state: TrainState) -> None:
    job, phase, pace = run.job, run.phase, run.job.pace
    dtype = torch.bfloat16 if job.engine.dtype == "bf16" else None
    device = local_device()
    first = state.step
    for offset, batches in enumerate(job.feed.steps(first, phase.stop)):
        factor = factor_at(first + offset, phase, job.plan.num_steps, job.lr)
        moved = (to_model(batch, device, dtype) for batch in batches)
        result = engine.train_step(moved, job.loss, factor)
        state.step = first + offset + 1
        loss, stop = _agree(result.loss, job.should_stop())
        _check_finite(loss, state.step)
        is_last = state.step == phase.stop
        if is_last or _is_due(state.step, pace.log):
            facts = {"loss": loss, "lr": engine.lr(factor), "grad_norm": result.grad_norm}
            run.emit("step", state.step, **facts, seconds=time.monotonic() - run.began)
        if is_last or _is_due(state.step, pace.evaluate):
            _evaluate(run, engine.module, state)
        if not is_last and (stop or _is_due(state.step, pace.checkpoint)):
            _snapshot(engine, state)
            _checkpoint(run, state)
        if stop and not is_last:
            raise Interrupted(f"stopped after step {state.step}; continue with --resume")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agree(loss: float, stop: bool) -> tuple[float, bool]:
    """Mean loss over ranks, and whether any rank wants to stop: one collective a step."""
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return loss, stop
    facts = torch.tensor([loss, float(stop)], device=local_device())
    torch.distributed.all_reduce(facts)
    mean, num_stops = (facts / torch.tensor([world_size, 1], device=facts.device)).tolist()
    return mean, num_stops > 0


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {step}",
            fix="lower the learning rate or check the data, then continue from the newest checkpoint with --resume",
        )


def _evaluate(run: _PhaseRun, module: nn.Module, state: TrainState) -> None:
    if run.job.evaluate is None:
        return
    module.eval()
    with torch.no_grad():
        metrics = run.job.evaluate(module)
    module.train()
    run.emit("eval", state.step, metrics=metrics, sparsity=sparsity_now(state))


def _checkpoint(run: _PhaseRun, state: TrainState) -> None:
    check_zeros(state)
    on_rank_0(lambda: save_checkpoint(run.job.checkpoints, state, run.job.pace.keep_checkpoints))
    run.emit("checkpoint", state.step, path=checkpoint_name(state.step))
