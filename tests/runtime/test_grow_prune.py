"""Masks at the start, growing and pruning: exact counts, zeros, repeatable draws, and nothing else touched."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx.errors import AuditError, DivergedError, UserError
from gapfx.masks import count_kept, pack, unpack
from gapfx.pattern import PATTERNS, top_mask
from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.runtime.grow_prune import (
    audit,
    check_ranks_agree,
    explored_share,
    grow,
    layout_of,
    prune,
    sparsity_now,
    start_masks,
)
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import OptimizerState, TrainState, live_slice, whole, whole_bits
from tests.runtime.threads import at, on_ranks

A, B, C = Weight("a", (10, 10), 0.8), Weight("b", (4, 8), 0.5, "2:4"), Weight("c", (8, 4), 0.75, "block:2x2")
PLAN = Plan((Group("front", (A,)), Group("back", (B, C))), sparsity=0.7)
KEPT = {"a": 20, "b": 16, "c": 8}


def fresh(seed: int = 0, plan: Plan = PLAN) -> TrainState:
    """Dense weights without a zero, one that is not planned, and moments."""
    torch.manual_seed(seed)
    shapes = {weight.fqn: weight.shape for weight in plan.weights()} | {"bias": (4,)}
    weights = {fqn: torch.randn(shape).flatten() for fqn, shape in shapes.items()}
    moments = {key: {fqn: torch.rand(w.shape) + 0.1 for fqn, w in weights.items()} for key in ("exp_avg", "exp_avg_sq")}
    optimizer = OptimizerState(moments, [{"step": (3.0, True)}])
    return TrainState(layout_of(shapes, plan), weights, optimizer=optimizer)


def dense(state: TrainState, table: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every weight, or moment, with its zeros in place."""
    table = state.weights if table is None else table
    return {fqn: whole(state, table, fqn).clone() for fqn in table}


def put(state: TrainState, fqn: str, value: Tensor) -> None:
    """Give a weight other live values."""
    state.weights[fqn] = live_slice(value.flatten(), state.bits.get(fqn))


def started(seed: int = 0) -> TrainState:
    state = fresh()
    start_masks(state, PLAN, seed)
    return state


def masks(state: TrainState) -> dict[str, Tensor]:
    return {weight.fqn: unpack(state.bits[weight.fqn], weight.shape) for weight in PLAN.weights()}


def train(state: TrainState, fqns: str) -> None:
    """What a phase does to live weights."""
    for fqn, value in dense(state).items():
        if fqn in fqns:
            put(state, fqn, value + torch.randn(value.shape))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_start_masks_have_exact_counts_and_masked_weights_are_gone() -> None:
    before, state = fresh(), started()
    assert {fqn: int(mask.sum()) for fqn, mask in masks(state).items()} == KEPT
    for fqn, mask in masks(state).items():
        assert torch.equal(dense(state)[fqn], dense(before)[fqn] * mask)
        assert state.weights[fqn].numel() == KEPT[fqn]
        for moments in state.optimizer.moments.values():
            assert torch.equal(dense(state, moments)[fqn] != 0, mask)
        assert torch.equal(state.sparse_bits[fqn], state.bits[fqn])
        assert torch.equal(state.explored[fqn], state.bits[fqn])
    assert torch.equal(state.weights["bias"], before.weights["bias"])
    assert sparsity_now(state) == 1 - sum(KEPT.values()) / 164
    assert explored_share(state) == sum(KEPT.values()) / 164


def test_start_masks_are_random_the_same_for_one_seed_and_others_for_another() -> None:
    first, again, other = masks(started(1)), masks(started(1)), masks(started(2))
    assert same(first, again)
    assert not any(torch.equal(first[fqn], other[fqn]) for fqn in KEPT)
    largest = dense(fresh())["a"].abs()
    assert largest[first["a"]].min() < largest[~first["a"]].max(), "not by magnitude"


def test_equal_weights_draw_masks_of_their_own() -> None:
    plan = Plan((Group("g", (dataclasses.replace(A, fqn="x"), dataclasses.replace(A, fqn="y"))),))
    state = fresh(plan=plan)
    start_masks(state, plan, 0)
    assert not torch.equal(state.bits["x"], state.bits["y"])


def test_start_masks_draw_nothing_from_the_global_stream() -> None:
    state, before = fresh(), torch.get_rng_state()
    start_masks(state, PLAN, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_that_the_first_phase_grows_start_as_they_were_initialised() -> None:
    plan = dataclasses.replace(PLAN, phases=(Phase("p", 0, 5, grow=(1,), prune=(1,)),))
    before, state = fresh(), fresh()
    start_masks(state, plan, 0)
    assert torch.equal(state.weights["b"], before.weights["b"])
    assert torch.equal(state.weights["c"], before.weights["c"])
    assert count_kept(state.bits["a"]) == KEPT["a"]
    assert explored_share(state) == (20 + 32 + 32) / 164


def test_growing_makes_a_group_dense_from_zero_and_leaves_the_others() -> None:
    state = started()
    before = copy.deepcopy(state)
    grow(state, PLAN, (1,))
    assert [bool(mask.all()) for mask in masks(state).values()] == [False, True, True]
    assert same(dense(state), dense(before)), "grown weights start at zero"
    for key, moments in state.optimizer.moments.items():
        assert same(dense(state, moments), dense(before, before.optimizer.moments[key]))
    assert same(state.sparse_bits, before.sparse_bits)
    assert torch.equal(state.bits["a"], before.bits["a"])
    assert sparsity_now(state) == pytest.approx(80 / 164)
    assert explored_share(state) == (20 + 64) / 164


def test_pruning_keeps_the_largest_and_drops_weights_and_moments() -> None:
    state = started()
    before_growth = masks(state)
    grow(state, PLAN, (1,))
    train(state, "bc")
    for moments in state.optimizer.moments.values():
        for fqn in KEPT:
            moments[fqn] = torch.rand(moments[fqn].shape) + 0.1
    trained = copy.deepcopy(state)
    old, old_moments = dense(trained), {key: dense(trained, m) for key, m in trained.optimizer.moments.items()}
    pruned = prune(state, PLAN, (1,), seed=0)
    assert list(pruned) == ["b", "c"]
    assert same({fqn: state.weights[fqn] for fqn in ("a", "bias")}, {f: trained.weights[f] for f in ("a", "bias")})
    assert torch.equal(state.bits["a"], trained.bits["a"])
    for fqn, facts in pruned.items():
        mask, value, new = masks(state)[fqn], old[fqn], dense(state)[fqn]
        assert torch.equal(new, value * mask)
        assert not torch.signbit(new[~mask]).any()
        for key, moments in state.optimizer.moments.items():
            assert torch.equal(dense(state, moments)[fqn], old_moments[key][fqn] * mask)
            assert torch.equal(moments["a"], trained.optimizer.moments[key]["a"])
        assert facts.numel == 32
        assert facts.kept == int(mask.sum()) == KEPT[fqn]
        assert facts.changed_bits == int((mask != before_growth[fqn]).sum()) > 0
        assert facts.delta2 == pytest.approx(float(value[~mask].square().sum() / value.square().sum()))
    assert pruned["c"].target == 0.75
    b, kept = old["b"].abs().view(-1, 4), masks(state)["b"].view(-1, 4)
    assert all(row[k].min() >= row[~k].max() for row, k in zip(b, kept, strict=True))
    assert explored_share(state) == (20 + 64) / 164, "what was ever live stays explored"


def test_pruning_counts_changes_from_the_mask_before_growth() -> None:
    state = started()
    grow(state, PLAN, (0,))
    assert prune(state, PLAN, (0,), 0)["a"].changed_bits == 0, "nothing was trained: the same weights are the largest"
    grow(state, PLAN, (0,))
    put(state, "a", torch.where(masks(started())["a"], 0.0, torch.arange(1.0, 101).view(10, 10)))
    facts = prune(state, PLAN, (0,), 0)["a"]
    assert facts.changed_bits == 40, "all 20 dropped, 20 others kept"


def test_pruning_a_sparse_group_gives_the_same_masks() -> None:
    state = started()
    before = copy.deepcopy(state)
    pruned = prune(state, PLAN, (0, 1), 0)
    assert same(state.bits, before.bits)
    assert same(dense(state), dense(before))
    assert [(facts.changed_bits, facts.delta2) for facts in pruned.values()] == [(0, 0.0)] * 3


def test_a_random_prune_depends_on_seed_and_step() -> None:
    drawn: list[Tensor] = []
    for seed, step in ((1, 5), (1, 5), (2, 5), (1, 6)):
        state = dataclasses.replace(started(), step=step)
        grow(state, PLAN, (0,))
        prune(state, dataclasses.replace(PLAN, criterion="random"), (0,), seed)
        drawn.append(state.bits["a"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_a_weight_of_zeros_is_pruned_without_an_error_measure() -> None:
    state = fresh()
    state.weights["a"].zero_()
    start_masks(state, PLAN, 0)
    grow(state, PLAN, (0,))
    facts = prune(state, PLAN, (0,), 0)["a"]
    assert facts.kept == 20
    assert facts.delta2 == 0.0
    assert unpack(state.bits["a"], (10, 10)).flatten().nonzero().flatten().tolist() == list(range(20)), "ties: first"


def test_a_cycle_over_both_groups_ends_with_exact_counts() -> None:
    state = started()
    for group, fqns in ((0, "a"), (1, "bc"), (0, "a")):
        grow(state, PLAN, (group,))
        train(state, fqns)
        prune(state, PLAN, (group,), 0)
    assert {fqn: int(mask.sum()) for fqn, mask in masks(state).items()} == KEPT
    assert explored_share(state) == 1.0


def test_nothing_planned_is_nothing_sparse() -> None:
    state = fresh(plan=Plan(()))
    start_masks(state, Plan(()), 0)
    assert sparsity_now(state) == 0.0
    assert explored_share(state) == 1.0


@pytest.mark.parametrize("group", [0, 1])
def test_weights_that_are_nan_are_named_before_anything_is_pruned(group: int) -> None:
    state = started()
    grow(state, PLAN, (group,))
    state.step = 11
    fqn = "a" if group == 0 else "b"
    state.weights[fqn][11:13] = math.nan
    with pytest.raises(DivergedError, match=rf"^2 of \d+ scores of {fqn} are NaN at step 11\n"):
        prune(state, PLAN, (group,), 0)
    assert bool(masks(state)[fqn].all())


def test_an_unknown_criterion_is_named() -> None:
    with pytest.raises(UserError, match="unknown criterion 'size'"):
        start_masks(fresh(), dataclasses.replace(PLAN, start_masks="size"), 0)


def test_packed_and_plain_masks_agree_on_shape() -> None:
    state = started()
    for weight in PLAN.weights():
        assert torch.equal(pack(masks(state)[weight.fqn]), state.bits[weight.fqn])


def a_cycle(state: TrainState, plan: Plan) -> TrainState:
    """Start, and turns of both groups whose training is a function of the weights alone."""
    start_masks(state, plan, 0)
    for turn, group in enumerate((0, 1, 0)):
        grow(state, plan, (group,))
        for weight in plan.groups[group].weights:
            start, stop = state.bounds(weight.fqn)
            noise = torch.randn(weight.numel, generator=torch.Generator().manual_seed(turn))[start:stop]
            state.weights[weight.fqn] = state.weights[weight.fqn] + noise.round(decimals=1)  # with ties
        state.step += 5
        prune(state, plan, (group,), 0)
    return state


class Alternate:
    """A pattern of somebody else, who knows nothing of slices: of the whole, the best of every other weight."""

    fixed_sparsity = None

    def refusal(self, shape: tuple[int, ...]) -> None:
        return None

    def num_kept(self, shape: tuple[int, ...], sparsity: float) -> int:
        return max(1, round(math.prod(shape) * (1 - sparsity)))

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        allowed = torch.arange(score.numel()).view(score.shape) % 2 == 0
        return top_mask(torch.where(allowed, score + 1, 0.0), self.num_kept(tuple(score.shape), sparsity))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_masks_and_weights(
    size: int, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(PATTERNS)["_entries"], "alternate", lambda options: Alternate())
    back = (B, C, Weight("d", (6, 10), 0.8, "alternate"), Weight("e", (32, 4), 0.9, "block:16x1"))
    plan = dataclasses.replace(PLAN, groups=(PLAN.groups[0], Group("back", back)), criterion=criterion)
    new = fresh(plan=plan)
    one = a_cycle(copy.deepcopy(new), plan)

    def check(peers: Peers) -> None:
        mine = a_cycle(at(peers, new), plan)
        assert same({fqn: whole_bits(mine, fqn) for fqn in mine.bits}, one.bits)
        assert same(dense(mine), dense(one))
        for key, moments in mine.optimizer.moments.items():
            assert same(dense(mine, moments), dense(one, one.optimizer.moments[key]))
        assert (sparsity_now(mine), explored_share(mine)) == (sparsity_now(one), explored_share(one))
        check_ranks_agree(mine)

    on_ranks(size, check)


def test_a_slice_that_is_not_what_ranks_know_of_it_is_named() -> None:
    state = started()

    def check(peers: Peers) -> None:
        mine = at(peers, dataclasses.replace(state, step=7))
        if peers.rank == 1:
            mine.bits["b"][0] ^= 1
        check_ranks_agree(mine)

    with pytest.raises(AuditError, match=r"^slices of the mask of b keep \[.*\] weights at step 7, and rank 0 took"):
        on_ranks(3, check)


def test_an_audit_tells_sparsity_and_target_and_names_a_weight_off_its_target() -> None:
    state, plan = started(), PLAN
    found = audit(state, plan)
    assert found.sparsity == found.target == pytest.approx(sparsity_now(state))
    fqn = next(fqn for fqn in state.bits if count_kept(state.bits[fqn]) < state.layout[fqn].numel)
    kept = count_kept(state.bits[fqn])
    first = int(unpack(state.bits[fqn], (state.layout[fqn].numel,)).nonzero()[0])
    state.bits[fqn][first // 8] &= 255 - (1 << first % 8)
    state.put_bits(fqn, state.bits[fqn])
    with pytest.raises(AuditError, match=f"^the mask of {fqn} keeps {kept - 1} weights, its target is {kept} on all"):
        audit(state, plan)
