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
from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.runtime.grow_prune import (
    TrainState,
    check_zeros,
    explored_share,
    grow,
    prune,
    sparsity_now,
    start_masks,
)
from gapfx.runtime.shards import OptimizerState

A, B, C = Weight("a", (10, 10), 0.8), Weight("b", (4, 8), 0.5, "2:4"), Weight("c", (8, 4), 0.75, "block:2x2")
PLAN = Plan((Group("front", (A,)), Group("back", (B, C))), sparsity=0.7)
KEPT = {"a": 20, "b": 16, "c": 8}


def fresh(seed: int = 0) -> TrainState:
    """Dense weights without a zero, one that is not planned, and moments."""
    torch.manual_seed(seed)
    weights = {weight.fqn: torch.randn(weight.shape) for weight in PLAN.weights()} | {"bias": torch.randn(4)}
    moments = {key: {fqn: torch.rand(w.shape) + 0.1 for fqn, w in weights.items()} for key in ("exp_avg", "exp_avg_sq")}
    return TrainState(weights, {}, optimizer=OptimizerState(moments, [{"step": (3.0, True)}]))


def started(seed: int = 0) -> TrainState:
    state = fresh()
    start_masks(state, PLAN, seed)
    return state


def masks(state: TrainState) -> dict[str, Tensor]:
    return {weight.fqn: unpack(state.bits[weight.fqn], weight.shape) for weight in PLAN.weights()}


def train(state: TrainState, fqns: str) -> None:
    """What a phase does to live weights."""
    for fqn, mask in masks(state).items():
        if fqn in fqns:
            state.weights[fqn] += mask * torch.randn(mask.shape)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_start_masks_have_exact_counts_and_masked_weights_are_zero() -> None:
    before, state = fresh(), started()
    assert {fqn: int(mask.sum()) for fqn, mask in masks(state).items()} == KEPT
    for fqn, mask in masks(state).items():
        assert torch.equal(state.weights[fqn], before.weights[fqn] * mask)
        for moments in state.optimizer.moments.values():
            assert torch.equal(moments[fqn] != 0, mask)
        assert torch.equal(state.sparse_bits[fqn], state.bits[fqn])
        assert torch.equal(state.explored[fqn], state.bits[fqn])
    assert torch.equal(state.weights["bias"], before.weights["bias"])
    check_zeros(state)
    assert sparsity_now(state) == 1 - sum(KEPT.values()) / 164
    assert explored_share(state) == sum(KEPT.values()) / 164


def test_start_masks_are_random_the_same_for_one_seed_and_others_for_another() -> None:
    first, again, other = masks(started(1)), masks(started(1)), masks(started(2))
    assert same(first, again)
    assert not any(torch.equal(first[fqn], other[fqn]) for fqn in KEPT)
    largest = fresh().weights["a"].abs()
    assert largest[first["a"]].min() < largest[~first["a"]].max(), "not by magnitude"


def test_equal_weights_draw_masks_of_their_own() -> None:
    plan = Plan((Group("g", (dataclasses.replace(A, fqn="x"), dataclasses.replace(A, fqn="y"))),))
    state = TrainState({"x": torch.ones(10, 10), "y": torch.ones(10, 10)}, {})
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
    assert same(state.weights, before.weights), "grown weights start at zero"
    assert same(state.optimizer.moments, before.optimizer.moments)
    assert same(state.sparse_bits, before.sparse_bits)
    assert torch.equal(state.bits["a"], before.bits["a"])
    assert sparsity_now(state) == pytest.approx(80 / 164)
    assert explored_share(state) == (20 + 64) / 164
    check_zeros(state)


def test_pruning_keeps_the_largest_and_zeroes_weights_and_moments() -> None:
    state = started()
    before_growth = masks(state)
    grow(state, PLAN, (1,))
    train(state, "bc")
    for moments in state.optimizer.moments.values():
        for fqn in KEPT:
            moments[fqn] = torch.rand(moments[fqn].shape) + 0.1
    trained = copy.deepcopy(state)
    pruned = prune(state, PLAN, (1,), seed=0)
    assert list(pruned) == ["b", "c"]
    assert same({fqn: state.weights[fqn] for fqn in ("a", "bias")}, {f: trained.weights[f] for f in ("a", "bias")})
    assert torch.equal(state.bits["a"], trained.bits["a"])
    for fqn, facts in pruned.items():
        mask, value = masks(state)[fqn], trained.weights[fqn]
        assert torch.equal(state.weights[fqn], value * mask)
        assert not torch.signbit(state.weights[fqn][~mask]).any()
        for key, moments in state.optimizer.moments.items():
            assert torch.equal(moments[fqn], trained.optimizer.moments[key][fqn] * mask)
            assert torch.equal(moments["a"], trained.optimizer.moments[key]["a"])
        assert facts.numel == 32
        assert facts.kept == int(mask.sum()) == KEPT[fqn]
        assert facts.changed_bits == int((mask != before_growth[fqn]).sum()) > 0
        assert facts.delta2 == pytest.approx(float(value[~mask].square().sum() / value.square().sum()))
    assert pruned["c"].target == 0.75
    b, kept = trained.weights["b"].abs().view(-1, 4), masks(state)["b"].view(-1, 4)
    assert all(row[k].min() >= row[~k].max() for row, k in zip(b, kept, strict=True))
    check_zeros(state)
    assert explored_share(state) == (20 + 64) / 164, "what was ever live stays explored"


def test_pruning_counts_changes_from_the_mask_before_growth() -> None:
    state = started()
    grow(state, PLAN, (0,))
    assert prune(state, PLAN, (0,), 0)["a"].changed_bits == 0, "nothing was trained: the same weights are the largest"
    grow(state, PLAN, (0,))
    state.weights["a"] = torch.where(masks(started())["a"], 0.0, torch.arange(1.0, 101).view(10, 10))
    facts = prune(state, PLAN, (0,), 0)["a"]
    assert facts.changed_bits == 40, "all 20 dropped, 20 others kept"


def test_pruning_a_sparse_group_gives_the_same_masks() -> None:
    state = started()
    before = copy.deepcopy(state)
    pruned = prune(state, PLAN, (0, 1), 0)
    assert same(state.bits, before.bits)
    assert same(state.weights, before.weights)
    assert [(facts.changed_bits, facts.delta2) for facts in pruned.values()] == [(0, 0.0)] * 3


def test_weights_that_a_prune_revives_count_as_explored() -> None:
    state = started()
    plan = dataclasses.replace(PLAN, criterion="random")
    prune(state, plan, (0,), seed=9)
    assert explored_share(state) > sum(KEPT.values()) / 164
    assert not bool((state.bits["a"] & ~state.explored["a"]).any())


def test_a_random_prune_depends_on_seed_and_step() -> None:
    drawn: list[Tensor] = []
    for seed, step in ((1, 5), (1, 5), (2, 5), (1, 6)):
        state = dataclasses.replace(started(), step=step)
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
    check_zeros(state)


def test_nothing_planned_is_nothing_sparse() -> None:
    state = TrainState({"w": torch.randn(2)}, {})
    start_masks(state, Plan(()), 0)
    assert sparsity_now(state) == 0.0
    assert explored_share(state) == 1.0


@pytest.mark.parametrize("value", [1e-30, -1.0, math.inf, math.nan])
def test_a_masked_weight_that_is_not_zero_is_found(value: float) -> None:
    state = started()
    state.step = 7
    state.weights["b"][~masks(state)["b"]] = -0.0
    check_zeros(state)
    row, column = (~masks(state)["b"]).nonzero()[0].tolist()
    state.weights["b"][row, column] = value
    with pytest.raises(AuditError, match=r"^1 pruned weights of b are not zero at step 7$"):
        check_zeros(state)


@pytest.mark.parametrize("group", [0, 1])
def test_weights_that_are_nan_are_named_before_anything_is_pruned(group: int) -> None:
    state = started()
    grow(state, PLAN, (group,))
    state.step = 11
    fqn = "a" if group == 0 else "b"
    state.weights[fqn][1, :2] = math.nan
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
