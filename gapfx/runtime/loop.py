"""The run: phase after phase of grow, train, prune, with checkpoints, from the start or from a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from torch import Tensor

from gapfx.criterion import CRITERIA, ByGradient
from gapfx.plan import Plan
from gapfx.runtime.aside import keep, keep_taken, regrow_saved, rewind
from gapfx.runtime.engine import buffers_of
from gapfx.runtime.exchange import take_state
from gapfx.runtime.gradients import dense_gradients
from gapfx.runtime.grow_prune import (
    PrunedWeight,
    audit,
    check_ranks_agree,
    explored_share,
    grow,
    layout_of,
    prune,
    sparsity_now,
    start_masks,
)
from gapfx.runtime.memory import returning_memory
from gapfx.runtime.ranks import Peers
from gapfx.runtime.regrow import check_warmup, regrowth
from gapfx.runtime.replicas import Merge, for_team
from gapfx.runtime.rewire import rewire
from gapfx.runtime.skeleton import hollow, skeleton_of
from gapfx.runtime.soften import Softening
from gapfx.runtime.state import OptimizerState, TrainState
from gapfx.runtime.steps import (
    Job,
    PhaseRun,
    evaluate_state,
    open_engine,
    stop_if_owed,
    train_steps,
    write_checkpoint,
)
from gapfx.runtime.teams import Team, all_in_one_team, teams_for


def initial_state(job: Job) -> TrainState:
    """Weights of the module as it was built, masked by the plan's start masks, at step 0 (collective).

    The memory of the module's parameters is freed on the way.
    """
    peers = Peers.all()
    parameters = dict(job.module.named_parameters())
    layout = layout_of({fqn: tuple(parameter.shape) for fqn, parameter in parameters.items()}, job.plan)
    state = TrainState(layout, {}, {fqn: b.detach().clone() for fqn, b in buffers_of(job.module)}, peers=peers)
    for fqn, parameter in parameters.items():
        start, stop = state.bounds(fqn)
        # A copy, lest it keeps the whole weight, or the file that the model was built in.
        state.weights[fqn] = parameter.detach().float().cpu().flatten()[start:stop].clone()
        hollow(parameter)
    start_masks(state, job.plan, job.seed, _start_gradients(job, state))
    return state


def _start_gradients(job: Job, state: TrainState) -> dict[str, Tensor]:
    if not isinstance(CRITERIA[job.plan.start_masks], ByGradient):
        return {}
    return dense_gradients(
        PhaseRun(job, skeleton_of(job.module), 0, job.plan.phases[0], time.monotonic(), all_in_one_team()),
        state,
        range(len(job.plan.groups)),
    )


def train(job: Job, state: TrainState) -> TrainState:
    """The state after the last phase. `state` is the initial one or that of a checkpoint; it is changed in place.

    Raises Interrupted after a checkpoint when `should_stop` says so on any rank, DivergedError on a loss that is not
    finite, AuditError when ranks disagree or a pruned weight is not zero.
    """
    check_warmup(job.plan, job.regrow_warmup)
    skeleton, began = skeleton_of(job.module), time.monotonic()
    everyone, teams = all_in_one_team(), dict[int, Team]()
    for index, phase in enumerate(job.plan.phases):
        run = PhaseRun(job, skeleton, index, phase, began, everyone)
        if state.step == phase.stop and state.owed == "pruned":
            evaluate_state(run, state)
            stop_if_owed(state)
        if state.step < phase.stop or (state.step == phase.stop and state.owed):
            if phase.replicas == 1:
                _run_phase(run, state)
                continue
            if phase.replicas not in teams:
                teams[phase.replicas] = teams_for(phase.replicas)
            _run_replicas(dataclasses.replace(run, team=teams[phase.replicas]), state)
    return state


def _run_phase(run: PhaseRun, state: TrainState) -> None:
    with returning_memory():
        if state.step == run.phase.start:
            _forget(run, state)
            if run.phase.rewind:
                rewind(state)
            changed = rewire(run, state) if run.phase.drop else 0
            grow(state, run.job.plan, run.phase.grow)
            if run.phase.growth == "saved":
                regrow_saved(state, run.grown)
            _announce(run, state, changed)
        check_ranks_agree(state)
    train_phase(run, state)
    with returning_memory():
        _conclude(run, state, prune_phase(run, state))


def prune_phase(run: PhaseRun, state: TrainState) -> dict[str, PrunedWeight]:
    """Keep aside what the phase keeps, and prune (collective)."""
    phase = run.phase
    keep(state, state.weights if phase.keep else ())
    keep_taken(state, () if phase.keep else run.saves)
    if phase.prune:
        Softening.of(run.job.plan, phase).settle(state)
    return prune(state, run.plan, phase.prune, run.job.seed, _gradients(run, state))


def _gradients(run: PhaseRun, state: TrainState) -> dict[str, Tensor]:
    """Those that the prune at the phase's end asks for (collective)."""
    is_asked = run.phase.prune and isinstance(CRITERIA[run.plan.criterion], ByGradient)
    return dense_gradients(run, state, run.phase.prune) if is_asked else {}


def _run_replicas(run: PhaseRun, state: TrainState) -> None:
    """Each replica grows, trains and prunes its own groups, as many at a time as there are teams (collective)."""
    job, phase, team = run.job, run.phase, run.team
    _forget(run, state)
    merge, pruned = Merge(job.plan, phase, state), dict[str, PrunedWeight]()
    for turn in range(phase.replicas // team.count):
        replica = turn * team.count + team.index
        one = dataclasses.replace(run, replica=replica)
        with returning_memory():
            mine = for_team(state, team.peers)
            grow(mine, job.plan, phase.grown_by(replica))
            check_ranks_agree(mine)
            _announce(one, mine)
        trained = train_phase(one, mine)
        with returning_memory():
            own = prune(mine, run.plan, phase.grown_by(replica), job.seed, _gradients(one, mine))
            for told in state.peers.tell(own):
                pruned |= told
            merge.add(mine, team, turn, trained)
    with returning_memory():
        merge.finish()
        _conclude(run, state, pruned)


def train_phase(run: PhaseRun, state: TrainState) -> frozenset[str]:
    """Train a state to the phase's end; the parameters that were trained."""
    with returning_memory():
        engine = open_engine(run, state)
    trained = frozenset(engine.trained)
    try:
        with regrowth(engine, state, run.grown, run.phase.start, run.job.regrow_warmup) as grown:
            train_steps(run, engine, state)
            grown.settle()
        with returning_memory():
            take_state(engine, state, is_last=True, with_optimizer=not run.is_reset_next)
    finally:
        engine.close()
    return trained


def _forget(run: PhaseRun, state: TrainState) -> None:
    if run.phase.state == "reset" and state.step == run.phase.start:
        state.optimizer = OptimizerState()


def _announce(run: PhaseRun, state: TrainState, changed_bits: int = 0) -> None:
    phase, plan = run.phase, run.job.plan
    facts = {"grow": _names(plan, phase.grow), "prune": _names(plan, phase.prune), "sparsity": sparsity_now(state)}
    facts |= {"drop": phase.drop, "regrow": phase.regrow, "changed_bits": changed_bits} if phase.drop else {}
    run.emit("phase", state.step, name=phase.name, round=phase.round, stop=phase.stop, **facts)


def _conclude(run: PhaseRun, state: TrainState, pruned: Mapping[str, PrunedWeight]) -> None:
    """Audit, tell of it and of the prunes, evaluate what was pruned to its target, and save (collective)."""
    run.emit("audit", state.step, **dataclasses.asdict(audit(state, run.plan)))
    if run.phase.prune:
        weights = {fqn: dataclasses.asdict(facts) for fqn, facts in pruned.items()}
        groups = _names(run.job.plan, run.phase.prune)
        run.emit("prune", state.step, groups=groups, weights=weights, explored=explored_share(state))
    if run.phase.prune and not run.is_passing:
        evaluate_state(run, state)
    write_checkpoint(run, state)
    stop_if_owed(state)


def _names(plan: Plan, groups: tuple[int, ...]) -> list[str]:
    return [plan.groups[group].name for group in groups]
