"""The steps of one phase: what is trained, logged, evaluated and saved, and when it stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.errors import DivergedError, Interrupted
from gapfx.ops.preparation import preparation_seconds
from gapfx.plan import Phase, Plan
from gapfx.runtime.checkpoint import checkpoint_name, save_checkpoint
from gapfx.runtime.engine import Engine, EngineOptions, LossFunction, OptimizerFactory, buffers_of, local_device
from gapfx.runtime.evaluation import Evaluate, evaluated
from gapfx.runtime.exchange import build_module, evaluation_module, fill_engine, give_back, take_state
from gapfx.runtime.feed import Feed, to_model
from gapfx.runtime.grow_prune import sparsity_now
from gapfx.runtime.learning_rate import LrFactor, factor_at, warmup_cosine
from gapfx.runtime.memory import peak_resident_bytes
from gapfx.runtime.ranks import Peers
from gapfx.runtime.soften import Softening
from gapfx.runtime.state import TrainState
from gapfx.runtime.teams import Team

Event = dict[str, Any]
# Schedulers kill half a minute after they ask; steps below this are not broken off, which would cost a collective each
# micro-batch.
LONG_STEP_SECONDS = 5.0


@dataclass(frozen=True)
class Pace:
    """How many steps lie between log lines, evaluations and checkpoints; 0 = only at phase ends."""

    log: int = 10
    evaluate: int = 0
    checkpoint: int = 0
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class Job:
    """What to train and how. `live` are the weights of which engines hold live values alone.

    `evaluate` gives metrics on the validation data, `test` on the test data, which is asked once, at the run's end.
    `regrow_warmup` is the length in steps of the warm-up of new weights (see gapfx.runtime.regrow), 0 for none. `emit`
    receives events on every rank; `should_stop` is asked after every step, between the micro-batches of long steps, and
    before every batch of an evaluation.
    """

    plan: Plan
    module: nn.Module
    feed: Feed
    loss: LossFunction
    optimizer: OptimizerFactory
    engine: EngineOptions
    checkpoints: Path
    live: frozenset[str] = frozenset()
    evaluate: Evaluate | None = None
    test: Evaluate | None = None
    lr: LrFactor = warmup_cosine
    pace: Pace = field(default_factory=Pace)
    seed: int = 0
    regrow_warmup: int = 0
    emit: Callable[[Event], None] = lambda event: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class PhaseRun:
    """One phase of a job, as the ranks of one team run it for one replica."""

    job: Job
    skeleton: nn.Module
    index: int
    phase: Phase
    began: float
    team: Team
    replica: int = 0

    @property
    def plan(self) -> Plan:
        """The plan, with the sparsity to which this phase prunes."""
        return self.job.plan.eased(self.index)

    @property
    def is_reset_next(self) -> bool:
        """Whether the next phase begins with an empty optimizer state."""
        following = self.job.plan.phases[self.index + 1 :]
        return bool(following) and following[0].state == "reset"

    @property
    def is_passing(self) -> bool:
        """Whether this phase ends on the way: with no more than an exchange, or with a part of a prune."""
        following = self.job.plan.phases[self.index + 1 :]
        if not self.phase.prune:
            return bool(following) and following[0].drop > 0
        return bool(following) and self.phase.depth < 1 and not following[0].rewind

    @property
    def saves(self) -> list[str]:
        """FQNs of the weights that this phase prunes and that grow again, later, to what they were."""
        plan, later = self.job.plan, self.job.plan.phases[self.index + 1 :]
        wanted = {group for phase in later if phase.growth == "saved" for group in phase.grow}
        return [weight.fqn for group in self.phase.prune if group in wanted for weight in plan.groups[group].weights]

    @property
    def grown(self) -> list[str]:
        """FQNs of the weights that grow in this replica."""
        groups = self.phase.grown_by(self.replica)
        return [weight.fqn for group in groups for weight in self.job.plan.groups[group].weights]

    def emit(self, event: str, step: int, **facts: Any) -> None:
        """Tell what happened in the first replica, which stands for all."""
        if self.replica == 0:
            self.job.emit({"event": event, "step": step, "phase": self.index, **facts})


def open_engine(run: PhaseRun, state: TrainState) -> Engine:
    """An engine that holds the state from now on (collective)."""
    job = run.job
    options = job.engine.among(run.team.peers.size, job.feed.world_size)
    module = build_module(job.plan, run.skeleton, state, job.live, options, run.team)
    engine = Engine(module, job.optimizer, options, run.team)
    fill_engine(engine, state)
    module.train()
    return engine


def descend(run: PhaseRun, engine: Engine, step: int) -> None:
    """One step on the batches of `step`, with the full learning rate, that is not told of (collective)."""
    feed = run.job.feed.among(run.team.peers.rank, run.team.peers.size)
    dtype = torch.bfloat16 if run.job.engine.dtype == "bf16" else None
    batches = next(feed.steps(step, step + 1))
    engine.train_step((to_model(batch, local_device(), dtype) for batch in batches), run.job.loss, 1.0)


def train_steps(run: PhaseRun, engine: Engine, state: TrainState) -> None:
    """Train to the end of the phase, after the evaluation that the state may owe.

    Raises Interrupted after a checkpoint when a stop is asked for on any rank (a phase of replicas is given up: it has
    no state in between), DivergedError on a loss that is not finite.
    """
    softening = Softening.of(run.job.plan, run.phase)
    _evaluate_owed(run, engine, state, softening)
    job, phase, pace = run.job, run.phase, run.job.pace
    dtype = torch.bfloat16 if job.engine.dtype == "bf16" else None
    device = local_device()
    first, is_whole = state.step, phase.replicas == 1
    feed = job.feed.among(run.team.peers.rank, run.team.peers.size)
    preparation_seconds(reset=True)  # of kernels that another phase or a measurement has used
    is_long = True  # nobody knows yet
    for offset, batches in enumerate(feed.steps(first, phase.stop)):
        factor = factor_at(first + offset, phase, job.plan.num_steps, job.lr)
        moved = (to_model(batch, device, dtype) for batch in batches)
        engine.around = partial(softening.around, engine, first + offset)
        before, step_began = _copied_buffers(engine) if is_long else {}, time.monotonic()
        try:
            result = engine.train_step(_unless_stopped(job, moved) if is_long else moved, job.loss, factor)
        except _GivenUp:
            _put_back(engine, before)
            if is_whole and state.step > first:
                _save(run, engine, state)
            raise _stopped(state) from None
        state.step = first + offset + 1
        # Weights are lost with an infinite gradient, though the loss of this step is still a number.
        value = math.inf if math.isinf(result.grad_norm) and math.isfinite(result.loss) else result.loss
        seconds = time.monotonic() - step_began
        loss, stop, is_long = _agree(run.team, value, job.should_stop(), state.step, seconds)
        is_last = state.step == phase.stop
        if is_last or _is_due(state.step, pace.log):
            facts = {"loss": loss, "lr": engine.lr(factor), "grad_norm": result.grad_norm}
            prepared = preparation_seconds(reset=True)
            facts |= {"preparation_seconds": round(prepared, 4)} if prepared else {}
            run.emit("step", state.step, **facts, seconds=time.monotonic() - run.began)
        # Teams that train other replicas meanwhile take part, to hear of a stop.
        is_due = (is_last and not run.is_passing) or _is_due(state.step, pace.evaluate)
        if run.replica < run.team.count and is_due:
            state.owed = "trained"
            if not stop:
                with softening.around(engine, state.step):
                    _evaluate(run, engine.module, state)
        stop = stop or bool(state.owed)
        if stop and is_last:
            state.owed = state.owed or "end"  # its prune, also where nothing is evaluated before
        if is_whole and (stop or (not is_last and _is_due(state.step, pace.checkpoint))):
            _save(run, engine, state)
        if stop:
            raise _stopped(state)


def _evaluate_owed(run: PhaseRun, engine: Engine, state: TrainState, softening: Softening) -> None:
    """Make the evaluation that a stop has left; the end of a phase, which may be owed too, comes after its steps."""
    if state.owed == "trained":
        with softening.around(engine, state.step):
            _evaluate(run, engine.module, state)
        stop_if_owed(state)
    state.owed = ""


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: PhaseRun, engine: Engine, state: TrainState) -> None:
    take_state(engine, state, is_last=False)
    write_checkpoint(run, state)
    give_back(engine, state)


class _GivenUp(Exception):
    """A stop was asked for in the middle of a step, which will be made anew."""


def _unless_stopped(job: Job, batches: Iterable[Any]) -> Iterator[Any]:
    """The micro-batches of a step, until any rank wants to stop (collective between two of them)."""
    for turn, batch in enumerate(batches):
        if turn and float(Peers.all().total(torch.tensor([float(job.should_stop())]))[0]):
            raise _GivenUp
        yield batch


def _copied_buffers(engine: Engine) -> dict[str, Tensor]:
    """What forwards may change, such as running means: the only part of a step that is there before its end."""
    return {fqn: buffer.clone() for fqn, buffer in buffers_of(engine.module)}


def _put_back(engine: Engine, buffers: dict[str, Tensor]) -> None:
    for fqn, buffer in buffers_of(engine.module):
        buffer.copy_(buffers[fqn])


def _agree(team: Team, loss: float, stop: bool, step: int, seconds: float) -> tuple[float, bool, bool]:
    """Mean loss of the team, whether any rank of all wants to stop, and whether steps are long on the mean of all.

    One collective a step, or two for teams. Raises DivergedError on every rank when the loss of any is not finite.
    """
    facts = torch.tensor([loss, float(stop), float(not math.isfinite(loss)), seconds], dtype=torch.float64)
    facts = team.peers.total(facts)
    mean = float(facts[0]) / team.peers.size
    if team.count > 1:
        facts = Peers.all().total(facts)
    if float(facts[2]):
        told = float(facts[0]) / Peers.all().size  # not finite, whichever replica's it is
        whose = " of another replica" if math.isfinite(mean) else ""
        raise DivergedError(
            f"the loss{whose} is {told} at step {step}{', or a gradient is' if math.isinf(told) else ''}",
            fix="lower the learning rate in a new run (--lr-scale 0.5), or mend the data and continue with --resume",
        )
    return mean, float(facts[1]) > 0, float(facts[3]) > LONG_STEP_SECONDS * Peers.all().size


def _evaluate(run: PhaseRun, module: nn.Module, state: TrainState) -> None:
    """Evaluate the first replica; the state goes on owing it when a stop is asked for meanwhile (collective)."""
    if run.job.evaluate is not None:
        module.eval()
        evaluate = run.job.evaluate if run.replica == 0 else _nothing
        metrics = evaluated(evaluate, module, Peers.all(), run.job.should_stop)
        module.train()
        if metrics is None:
            return
        run.emit("eval", state.step, metrics=metrics, sparsity=sparsity_now(state))
    state.owed = ""


def _nothing(module: nn.Module, before_batch: Callable[[], object]) -> dict[str, float]:
    return {}


def stop_if_owed(state: TrainState) -> None:
    """Raise Interrupted when an evaluation was given up."""
    if state.owed:
        raise _stopped(state)


def _stopped(state: TrainState) -> Interrupted:
    return Interrupted(f"stopped after step {state.step}; continue with --resume")


def evaluate_state(run: PhaseRun, state: TrainState) -> None:
    """Evaluate what is left after a prune; the state owes it when a stop is asked for meanwhile (collective)."""
    job = run.job
    if job.evaluate is not None:
        state.owed = "pruned"
        with evaluation_module(job.plan, run.skeleton, state, job.live, job.engine) as module:
            _evaluate(run, module, state)


def write_checkpoint(run: PhaseRun, state: TrainState) -> None:
    """Save the state (collective)."""
    save_checkpoint(run.job.checkpoints, state, run.job.pace.keep_checkpoints)
    peaks = state.peers.tell(peak_resident_bytes())
    run.emit("checkpoint", state.step, path=checkpoint_name(state.step), peak_rss_bytes_by_rank=peaks)
