"""What happens between phases: masks at the start, growing a group, pruning it back.

Every rank works on its own slice of each weight. Thresholds are exact over all of them and ties go to the lowest flat
index, so that masks do not depend on the number of ranks; `check_ranks_agree` proves that they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gapfx.criterion import CRITERIA, ByGradient, Criterion, is_elementwise, is_ordinal
from gapfx.errors import AuditError, DivergedError, UserError
from gapfx.masks import count_kept, digest, pack, unpack
from gapfx.pattern import SlicedPattern, parse_pattern
from gapfx.plan import Plan, Weight
from gapfx.runtime.aside import keep
from gapfx.runtime.ranks import Peers
from gapfx.runtime.seeds import generator
from gapfx.runtime.select import top_of_all, top_of_slices
from gapfx.runtime.state import BYTE, Spread, TrainState, dense_slice, live_slice, whole, whole_bits

Gradients = Mapping[str, Tensor]
NO_GRADIENTS: Gradients = {}
_LOWEST = -(2**40)  # of scores that are whole numbers; blocks add them up


@dataclass(frozen=True)
class Scoring:
    """A criterion by name, a generator for each weight, and this rank's slices of gradients where it takes them."""

    name: str
    draw: Callable[[str], torch.Generator]
    gradients: Gradients

    def of(self, fqn: str) -> Criterion:
        """What scores a weight."""
        found = CRITERIA[self.name]
        return found.given(self.gradients[fqn]) if isinstance(found, ByGradient) else found


@dataclass(frozen=True)
class PrunedWeight:
    """One prune of one weight.

    `target` is the sparsity in the plan, which a weight that was pruned together with others need not have.
    `changed_bits` counts mask bits that differ from the mask before it grew; `delta2` is the relative error
    |w - w*m|^2 / |w|^2 of the prune (the delta^2 of the paper's theorem).
    """

    numel: int
    kept: int
    target: float
    changed_bits: int
    delta2: float


def layout_of(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, Spread]:
    """How each parameter is cut over ranks: planned weights only where their pattern allows."""
    patterns = {weight.fqn: parse_pattern(weight.pattern) for weight in plan.weights()}
    layout: dict[str, Spread] = {}
    for fqn, shape in shapes.items():
        pattern = patterns.get(fqn)
        granule = pattern.granule(shape) if isinstance(pattern, SlicedPattern) else 1
        layout[fqn] = Spread(shape, math.lcm(BYTE, granule))
    return layout


def start_masks(state: TrainState, plan: Plan, seed: int, gradients: Gradients = NO_GRADIENTS) -> None:
    """Mask planned weights, held dense, at their target sparsity by `plan.start_masks` (collective).

    Groups that the first phase grows start dense, as they were initialised: a mask would have zeroed them. Where
    replicas grow them, all start from the same sparse model (section 3.2 of the paper). What masks by a criterion take
    of weights that grow from saved values is kept aside for that; random masks take what is worth nothing.

    Raises UserError for a criterion that cannot make the plan's prunes.
    """
    check_prunes(plan)
    is_dense = set(plan.phases[0].grow if plan.phases and plan.phases[0].replicas == 1 else ())
    draw = _draws(plan, seed, 0)
    scoring = Scoring(plan.start_masks, draw, gradients)
    for weight in plan.weights():
        state.put_ones(weight.fqn)
        state.sparse_bits[weight.fqn] = state.bits[weight.fqn]
    returning = {group for phase in plan.phases if phase.growth == "saved" for group in phase.grow}
    returning = returning if plan.start_masks != "random" else set[int]()
    for number, group in enumerate(plan.groups):
        is_apart = is_ordinal(CRITERIA[plan.start_masks])
        pools = [(weight,) for weight in group.weights] if is_apart else plan.pools(group)
        for pool in pools if number not in is_dense else ():
            for weight, mask in zip(pool, _pool_masks(state, pool, scoring), strict=True):
                if number in returning:
                    keep(state, [weight.fqn])
                set_mask(state, weight.fqn, mask)
    state.explored |= {fqn: bits.clone() for fqn, bits in state.sparse_bits.items()}


def grow(state: TrainState, plan: Plan, groups: Iterable[int]) -> None:
    """Make the groups dense. Their masked weights are already 0 and start to train from there."""
    for group in groups:
        for weight in plan.groups[group].weights:
            fqn = weight.fqn
            for table in state.tables(fqn):
                table[fqn] = dense_slice(state, table, fqn)
            state.put_ones(fqn)
            state.explored[fqn] = state.bits[fqn]


def prune(
    state: TrainState, plan: Plan, groups: Iterable[int], seed: int, gradients: Gradients = NO_GRADIENTS
) -> dict[str, PrunedWeight]:
    """Prune the groups to their target by `plan.criterion`; what is not kept is gone, moments too (collective)."""
    scoring = Scoring(plan.criterion, _draws(plan, seed, state.step), gradients)
    pruned: dict[str, PrunedWeight] = {}
    for pool in (pool for group in groups for pool in plan.pools(plan.groups[group])):
        for weight, mask in zip(pool, _pool_masks(state, pool, scoring), strict=True):
            pruned[weight.fqn] = _prune(state, weight, mask)
    return pruned


def _prune(state: TrainState, weight: Weight, mask: Tensor) -> PrunedWeight:
    fqn = weight.fqn
    before, value = state.sparse_bits[fqn], dense_slice(state, state.weights, fqn)
    lost, had = state.peers.total(torch.stack([value[~mask].square().sum(), value.square().sum()]))
    set_mask(state, fqn, mask)
    own = state.sparse_bits[fqn]
    changed, kept = state.peers.total(torch.tensor([count_kept(before ^ own), count_kept(own)])).tolist()
    delta2 = float(lost / had.clamp_min(torch.finfo(value.dtype).tiny))
    return PrunedWeight(weight.numel, kept, weight.sparsity, changed, delta2)


def sparsity_now(state: TrainState) -> float:
    """Share of zeros over all planned weights, by the masks in force."""
    numel = sum(state.layout[fqn].numel for fqn in state.bits)
    return 1 - sum(state.num_live(fqn) for fqn in state.bits) / numel if numel else 0.0


def explored_share(state: TrainState) -> float:
    """Share of planned weights that were live in any phase so far (collective)."""
    numel = sum(state.layout[fqn].numel for fqn in state.explored)
    own = sum(count_kept(bits) for bits in state.explored.values())
    return int(state.peers.total(torch.tensor(own))) / numel if numel else 1.0


def check_ranks_agree(state: TrainState) -> None:
    """Raise AuditError that names a weight whose slices are not what the ranks know of them (collective).

    Masks are cut over ranks; all of them know how many values live in each slice.
    """
    counts = torch.zeros(len(state.bits), state.peers.size, dtype=torch.int64)
    counts[:, state.peers.rank] = torch.tensor([count_kept(bits) for bits in state.bits.values()], dtype=torch.int64)
    found = dict(zip(state.bits, map(tuple, state.peers.total(counts).tolist()), strict=True))
    wrong = next((fqn for fqn in found if found[fqn] != state.lives[fqn]), None)
    for rank, fqn in enumerate(state.peers.tell(wrong)):
        if fqn is not None:
            raise AuditError(
                f"slices of the mask of {fqn} keep {list(found[fqn])} weights at step {state.step}, "
                f"and rank {rank} took them to keep {list(state.lives[fqn])}"
            )


@dataclass(frozen=True)
class Audit:
    """What was found at a phase boundary: sparsity by the masks and by the plan, and the hash of all masks."""

    sparsity: float
    target: float
    masks: str


def audit(state: TrainState, plan: Plan) -> Audit:
    """Compare masks with what ranks know of them, and each with its target (collective).

    A weight that has grown is all live. Weights that are pruned together have a target together.
    Raises AuditError that names the weights.
    """
    check_ranks_agree(state)
    kept, wanted, numel, problems = 0, 0, 0, list[str]()
    for pool in (pool for group in plan.groups for pool in plan.pools(group)):
        actual, target = sum(state.num_live(weight.fqn) for weight in pool), _num_planned(pool)
        dense = sum(weight.numel for weight in pool)
        if actual not in (target, dense):
            which, whose = ("mask of {} keeps", "its") if len(pool) == 1 else ("masks of {} together keep", "their")
            names = ", ".join(weight.fqn for weight in pool)
            problems.append(f"the {which.format(names)} {actual} weights, {whose} target is {target}")
        kept, numel = kept + actual, numel + dense
        wanted += dense if actual == dense else target
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise AuditError(f"{problems[0]} on all ranks at step {state.step}{more}")
    sparsity, target = ((1 - live / numel if numel else 0.0) for live in (kept, wanted))
    return Audit(sparsity, target, digest((fqn, whole_bits(state, fqn)) for fqn in sorted(state.bits)))


def check_prunes(plan: Plan) -> None:
    """Raise UserError for prunes that a pattern or the criterion cannot make."""
    for weight in plan.weights():
        pattern = parse_pattern(weight.pattern)
        if pattern.fixed_sparsity is not None and any(phase.depth < 1 for phase in plan.phases):
            raise UserError(
                f"{weight.fqn} has the pattern {weight.pattern}, which cannot be reached step by step",
                fix="take --landing 1, another --method, or --pattern unstructured",
            )
        is_part_kept = pattern.fixed_sparsity is None and isinstance(pattern, SlicedPattern)
        if not is_part_kept and any(phase.drop for phase in plan.phases):
            raise UserError(
                f"{weight.fqn} has the pattern {weight.pattern}, of which no share can be dropped and regrown",
                fix="take another --method, or --pattern unstructured",
            )
        criteria = [CRITERIA[name] for name in (plan.criterion, plan.start_masks)]
        if not isinstance(pattern, SlicedPattern) and any(isinstance(each, ByGradient) for each in criteria):
            raise UserError(
                f"{weight.fqn} has the pattern {weight.pattern}, which takes no criterion of gradients",
                fix="take --criterion magnitude, or another --pattern",
            )
    pruned = {group for phase in plan.phases for group in phase.prune}
    is_shared = any(len(pool) > 1 for group in pruned for pool in plan.pools(plan.groups[group]))
    if is_shared and is_ordinal(CRITERIA[plan.criterion]):
        raise UserError(
            f"one threshold for a group cannot compare weights by the criterion {plan.criterion!r}",
            fix="take --criterion magnitude, or --allocation uniform or erk",
        )


def _num_planned(pool: Iterable[Weight]) -> int:
    return sum(parse_pattern(weight.pattern).num_kept(weight.shape, weight.sparsity) for weight in pool)


def _draws(plan: Plan, seed: int, step: int) -> Callable[[str], torch.Generator]:
    order = {weight.fqn: index for index, weight in enumerate(plan.weights())}
    return lambda fqn: generator(seed, step, order[fqn])


def _pool_masks(state: TrainState, pool: Sequence[Weight], scoring: Scoring) -> Iterator[Tensor]:
    """Flat mask of this rank's slice of each weight in turn (collective, also between them)."""
    if len(pool) == 1:
        yield _new_mask(state, pool[0], scoring)
        return

    def score(fqn: str) -> Tensor:
        return _slice_score(state, fqn, scoring)

    for weight in pool:
        check_scores(score(weight.fqn), weight.fqn, state, state.peers)
    yield from top_of_all([partial(score, weight.fqn) for weight in pool], _num_planned(pool), state.peers)


def _slice_score(state: TrainState, fqn: str, scoring: Scoring) -> Tensor:
    """Flat scores of this rank's slice."""
    score_of, draw, (start, stop) = scoring.of(fqn), scoring.draw(fqn), state.bounds(fqn)
    if is_elementwise(score_of):
        return _masked_last(state, fqn, score_of(dense_slice(state, state.weights, fqn), draw))
    return _masked_last(state, fqn, score_of(whole(state, state.weights, fqn), draw)).flatten()[start:stop]


def _masked_last(state: TrainState, fqn: str, score: Tensor) -> Tensor:
    """What an earlier prune has taken does not come back with a later one, whatever the criterion says of a zero.

    Scores of this rank's slice, or of the whole weight (collective).
    """
    if state.num_live(fqn) == state.layout[fqn].numel:
        return score
    is_whole = score.numel() == state.layout[fqn].numel
    live = unpack(whole_bits(state, fqn) if is_whole else state.bits[fqn], score.shape)
    lowest = -math.inf if score.is_floating_point() else _LOWEST
    return (score if score.is_floating_point() else score.long()).masked_fill(~live, lowest)


def _new_mask(state: TrainState, weight: Weight, scoring: Scoring) -> Tensor:
    """Flat mask of this rank's slice."""
    score_of, pattern = scoring.of(weight.fqn), parse_pattern(weight.pattern)
    draw, (start, stop) = scoring.draw(weight.fqn), state.bounds(weight.fqn)
    if is_elementwise(score_of) and isinstance(pattern, SlicedPattern):
        score = _masked_last(state, weight.fqn, score_of(dense_slice(state, state.weights, weight.fqn), draw))
        check_scores(score, weight.fqn, state, state.peers)
        top = partial(top_of_slices, peers=state.peers)
        return pattern.mask_slice(score, weight.shape, weight.sparsity, top)
    score = _masked_last(state, weight.fqn, score_of(whole(state, state.weights, weight.fqn), draw))
    check_scores(score, weight.fqn, state, Peers())
    return pattern.mask(score, weight.sparsity).flatten()[start:stop]


def check_scores(score: Tensor, fqn: str, state: TrainState, peers: Peers) -> None:
    """Raise DivergedError on every rank of `peers` for scores that are NaN on any (collective)."""
    num_nan = int(peers.total(score.isnan().sum()))
    if num_nan:
        raise DivergedError(
            f"{num_nan} of {state.layout[fqn].numel} scores of {fqn} are NaN at step {state.step}",
            fix="lower the learning rate in a new run (--lr-scale 0.5), or mend the data and continue with --resume",
        )


def set_mask(state: TrainState, fqn: str, mask: Tensor) -> None:
    """Put a flat mask of this rank's slice in force: what it drops is gone, what it adds starts at 0 (collective)."""
    own = pack(mask)
    for table in state.tables(fqn):
        table[fqn] = live_slice(dense_slice(state, table, fqn), own)
    state.put_bits(fqn, own)
    state.sparse_bits[fqn] = own
