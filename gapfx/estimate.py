"""What a run will take, from its plan alone: bytes of each rank by kind, traffic of a step, operations, time.

The model state of a rank is what outlives a forward: values, masks, gradients, fp32 master weights and moments. Which
of these ZeRO cuts is the table of its paper (Rajbhandari et al., 2020, figure 1): stage 1 cuts masters and moments, 2
gradients too, 3 values too. gapfx's own share is that weights count by their live values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gapfx.criterion import CRITERIA, ByGradient
from gapfx.device_profile import Profile
from gapfx.errors import UserError
from gapfx.flops import ForwardFlops, live_shares, training_flops
from gapfx.plan import Phase, Plan
from gapfx.runtime.deepspeed_config import BUCKET_SIZE

CUT_MASK_COPIES = 2  # in the state: in force, and explored
_FP32 = 4


@dataclass(frozen=True)
class Setup:
    """How a run is spread: ranks, ZeRO stage, bytes of a value in the forward, moments of the optimizer (Adam: 2).

    Not `is_compact`: weights are held dense beside their masks. Not `has_masks`: plain DeepSpeed.
    """

    ranks: int = 1
    zero: int = 1
    value_bytes: int = 4
    moments: int = 2
    is_compact: bool = True
    has_masks: bool = True


@dataclass(frozen=True)
class Sizes:
    """Elements of a model: planned weights, all other parameters, and of the largest planned weight."""

    planned: int
    rest: int
    largest: int

    @staticmethod
    def of(plan: Plan, num_parameters: int) -> Sizes:
        """Of a plan for a model with so many parameters in all."""
        numels = [weight.numel for weight in plan.weights()]
        return Sizes(sum(numels), num_parameters - sum(numels), max(numels, default=0))


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank, by kind, just before the optimizer steps.

    `gradients` with the fp32 copy of the rank's own part that DeepSpeed makes for its optimizer, `buckets` what it
    reduces gradients in at stage 3. `densified` is the largest weight made dense in a forward, no part of the state.
    `aside` are fp32 weights that were kept for a later phase (see gapfx.runtime.aside).
    """

    values: float
    masks: float
    gradients: float
    masters: float
    moments: float
    buckets: float
    densified: float
    aside: float = 0.0

    @property
    def state(self) -> float:
        """Of the model state."""
        return self.values + self.masks + self.gradients + self.masters + self.moments + self.buckets + self.aside


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: live share of the planned weights, bytes of a rank, bytes that a rank receives and sends in a step.

    `scoring` is what a rank holds while gradients of dense weights are taken before the first step, 0 where none are.
    """

    phase: Phase
    live: float
    rank: RankBytes
    traffic: float
    scoring: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes of the model state where it is largest."""
        return max(self.rank.state, self.scoring)


def estimate(plan: Plan, sizes: Sizes, setup: Setup) -> Iterator[PhaseEstimate]:
    """Each phase of the plan, its largest replica."""
    check_setup(setup)
    numels = [group.numel for group in plan.groups]
    phases = live_shares(plan, {weight.fqn: weight.numel for weight in plan.weights()})
    start = _start_bytes(plan, sizes, setup)
    for (phase, replicas), num_aside in zip(phases, _num_aside(plan, sizes), strict=True):
        live = max(sum(n * s for n, s in zip(numels, shares, strict=True)) for shares in replicas)
        count = (live if setup.is_compact else sizes.planned) + sizes.rest
        aside = _FP32 * num_aside / setup.ranks
        rank = dataclasses.replace(_rank_bytes(count, sizes, setup), aside=aside)
        scoring = _scoring_bytes(plan, phase, replicas[0], sizes, setup)
        scoring = max(scoring + aside if scoring else 0.0, start if phase.start == 0 else 0.0)
        yield PhaseEstimate(phase, live / max(1, sizes.planned), rank, _traffic(count, sizes, setup), scoring)


def check_setup(setup: Setup) -> None:
    """Raise UserError for a number of ranks, or a stage, that is none."""
    if setup.ranks < 1:
        raise UserError(f"{setup.ranks} ranks are none", fix="give --ranks 1 or more")
    if setup.zero not in (0, 1, 2, 3):
        raise UserError(f"there is no ZeRO stage {setup.zero}", fix="use --zero 0, 1, 2 or 3")


def _rank_bytes(count: float, sizes: Sizes, setup: Setup) -> RankBytes:
    own = count / setup.ranks
    has_copy = setup.zero >= 2 or (setup.zero == 1 and setup.value_bytes < _FP32)
    mask = sizes.planned / 8 if setup.has_masks else 0.0
    return RankBytes(
        values=setup.value_bytes * (own if setup.zero == 3 else count),
        masks=(mask / setup.ranks if setup.zero == 3 else mask) + CUT_MASK_COPIES * mask / setup.ranks,
        gradients=setup.value_bytes * (own if setup.zero >= 2 else count) + (_FP32 * own if has_copy else 0.0),
        masters=_FP32 * own if setup.zero else 0.0,
        moments=_FP32 * setup.moments * (own if setup.zero else count),
        buckets=float(setup.value_bytes * BUCKET_SIZE) if setup.zero == 3 else 0.0,
        densified=setup.value_bytes * sizes.largest if setup.is_compact else 0.0,
    )


def _scoring_bytes(plan: Plan, phase: Phase, shares: Sequence[float], sizes: Sizes, setup: Setup) -> float:
    """One group dense in an engine without moments, its gradients, and the rank's own part of the state beside them."""
    if not phase.drop or phase.regrow != "gradient":
        return 0.0
    lives = [group.numel * share for group, share in zip(plan.groups, shares, strict=True)]
    held, found = sum(lives) + sizes.rest, list[float]()
    for group, live in zip(plan.groups, lives, strict=True):
        count = held - live + group.numel if setup.is_compact else sizes.planned + sizes.rest
        engine = _rank_bytes(count, sizes, dataclasses.replace(setup, moments=0))
        found.append(engine.state + _FP32 * ((1 + setup.moments) * held + group.numel) / setup.ranks)
    return max(found)


def _start_bytes(plan: Plan, sizes: Sizes, setup: Setup) -> float:
    """Where start masks go by gradients: all dense in an engine without moments, weights and gradients beside it."""
    if not isinstance(CRITERIA[plan.start_masks], ByGradient):
        return 0.0
    engine = _rank_bytes(sizes.planned + sizes.rest, sizes, dataclasses.replace(setup, moments=0))
    return engine.state + _FP32 * (2 * sizes.planned + sizes.rest) / setup.ranks


def _num_aside(plan: Plan, sizes: Sizes) -> Iterator[int]:
    """Weights that are kept aside while each phase trains, on all ranks together."""
    last = {group: at for at, phase in enumerate(plan.phases) if phase.growth == "saved" for group in phase.grow}
    is_dense = set(plan.phases[0].grow if plan.phases and plan.phases[0].replicas == 1 else ())
    held, is_all = set(last) - is_dense if plan.start_masks != "random" else set[int](), False
    for index, phase in enumerate(plan.phases):
        held -= set(phase.grow if phase.growth == "saved" else ())
        yield sizes.planned + sizes.rest if is_all else sum(plan.groups[group].numel for group in held)
        held |= {group for group in phase.prune if last.get(group, index) > index}
        is_all = is_all or phase.keep


def _traffic(count: float, sizes: Sizes, setup: Setup) -> float:
    """By ring collectives: each gathers or scatters (N - 1) / N of what it is about.

    Stage 3 gathers values twice, and masks with them.
    """
    if setup.ranks == 1:
        return 0.0
    masks = 2 * sizes.planned / 8 if setup.zero == 3 and setup.has_masks else 0.0
    passes = 3 if setup.zero == 3 else 2
    return (passes * setup.value_bytes * count + masks) * (setup.ranks - 1) / setup.ranks


def smallest_ranks(plan: Plan, sizes: Sizes, setup: Setup, memory: float, most: int = 1 << 16) -> int | None:
    """The smallest power of two of ranks on which the model state of every phase fits into `memory` bytes, if any."""
    ranks = 1
    while ranks <= most:
        tried = dataclasses.replace(setup, ranks=ranks)
        if max(max(e.rank.state + e.rank.densified, e.scoring) for e in estimate(plan, sizes, tried)) <= memory:
            return ranks
        ranks *= 2
    return None


def dense_plan(plan: Plan) -> Plan:
    """The plan of dense training, as long, which a sparse one is held against."""
    phase = Phase("dense", 0, max(1, plan.num_steps), grow=tuple(range(len(plan.groups))))
    return dataclasses.replace(plan, phases=(phase,), start_masks="random")


def dense_estimate(plan: Plan, sizes: Sizes, setup: Setup) -> PhaseEstimate:
    """Plain DeepSpeed with the same model, ranks and stage."""
    return next(estimate(dense_plan(plan), sizes, dataclasses.replace(setup, has_masks=False, is_compact=False)))


def step_seconds(
    plan: Plan, forward: ForwardFlops, estimates: Sequence[PhaseEstimate], profile: Profile, forwards: float = 1.0
) -> float:
    """A step on a device: dense products of so many such forwards, then the traffic of a mean step."""
    steps = max(1, plan.num_steps)
    traffic = sum(e.traffic * e.phase.num_steps for e in estimates) / steps
    return forwards * training_flops(dense_plan(plan), forward) / steps / profile.flops + traffic / profile.bandwidth
