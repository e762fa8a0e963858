"""One threshold over a group: the highest scores of all its weights, on any number of ranks, and whole runs with it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.errors import AuditError, DivergedError, Interrupted, UserError
from gapfx.masks import count_kept, unpack
from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.report.facts import weight_states
from gapfx.report.read_run import read_run
from gapfx.runtime.grow_prune import audit, check_ranks_agree, grow, layout_of, prune, start_masks
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import TrainState, live_slice, whole, whole_bits
from tests.runs import TASK, assert_same_bits, events, finish, gapfx, summary, weights
from tests.runtime.test_loop import _stop_after  # pyright: ignore[reportPrivateUsage]
from tests.runtime.threads import at, on_ranks

A, B, C = Weight("a", (10, 10), 0.8), Weight("b", (7, 9), 0.5), Weight("c", (3, 5), 0.6)
ROWS, OWN = Weight("rows", (8, 8), 0.5, "2:4"), Weight("own", (8, 5), 0.75)
PLAN = Plan(
    (Group("front", (A, ROWS, B, C, OWN)), Group("back", (Weight("d", (6, 6), 0.5), Weight("e", (40,), 0.9)))),
    phases=(Phase("p", 0, 5, (1,), (1,)), Phase("q", 5, 10, (0,), (0,))),
    allocation="global",
    own_sparsity=("own",),
)
POOL, PLANNED = ("a", "b", "c"), 20 + 31 + 6


def started(values: dict[str, Tensor] | None = None, plan: Plan = PLAN) -> TrainState:
    """Group "front" grown, with the given weights or made-up ones."""
    torch.manual_seed(0)
    shapes = {weight.fqn: weight.shape for weight in plan.weights()}
    state = TrainState(layout_of(shapes, plan), {fqn: torch.randn(shape).flatten() for fqn, shape in shapes.items()})
    start_masks(state, plan, 0)
    grow(state, plan, (0,))
    for fqn, value in (values or {fqn: torch.randn(shapes[fqn]) for fqn in ("a", "rows", "b", "c", "own")}).items():
        state.weights[fqn] = live_slice(value.flatten(), state.bits[fqn])
    return state


def masks(state: TrainState, fqns: tuple[str, ...] = POOL) -> dict[str, Tensor]:
    return {fqn: unpack(state.bits[fqn], state.layout[fqn].shape).flatten() for fqn in fqns}


def expected(scores: dict[str, Tensor], num_kept: int) -> dict[str, Tensor]:
    """The plain way: each weight's highest, then a stable sort of all the others."""
    flat = torch.cat([score.flatten() for score in scores.values()]).clone()
    starts = [0, *torch.tensor([score.numel() for score in scores.values()]).cumsum(0).tolist()]
    for start, stop in itertools.pairwise(starts):
        flat[start + int(flat[start:stop].argmax())] = math.inf
    kept = torch.zeros(flat.numel(), dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:num_kept]] = True
    return {fqn: kept[start:stop] for fqn, (start, stop) in zip(scores, itertools.pairwise(starts), strict=True)}


def valued(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {weight.fqn: weight.shape for weight in (A, B, C)}
    made = {
        "normal": lambda shape: torch.randn(shape),
        "many ties": lambda shape: torch.randn(shape).round(),
        "all equal": lambda shape: torch.ones(shape),
        "all zero": lambda shape: torch.zeros(shape),
        "very unlike": lambda shape: torch.randn(shape) * 10.0 ** -math.prod(shape),
    }[kind]
    return {fqn: made(shape) for fqn, shape in shapes.items()}


KINDS = ["normal", "many ties", "all equal", "all zero", "very unlike"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prune_keeps_the_highest_of_all_weights_of_the_group(kind: str) -> None:
    values = valued(kind)
    state = started(values)
    others = {fqn: state.bits[fqn].clone() for fqn in ("d", "e")}
    pruned = prune(state, PLAN, (0,), 0)
    wanted = expected({fqn: value.abs() for fqn, value in values.items()}, PLANNED)
    found = masks(state)
    assert [fqn for fqn in POOL if not torch.equal(found[fqn], wanted[fqn])] == []
    assert sum(pruned[fqn].kept for fqn in POOL) == PLANNED
    assert {fqn: pruned[fqn].kept for fqn in POOL} == {fqn: int(found[fqn].sum()) for fqn in POOL}
    assert min(pruned[fqn].kept for fqn in POOL) >= 1
    for fqn in POOL:
        assert torch.equal(whole(state, state.weights, fqn).flatten(), values[fqn].flatten() * found[fqn])
    assert all(torch.equal(state.bits[fqn], bits) for fqn, bits in others.items())


def test_layers_get_what_their_weights_are_worth() -> None:
    values = valued("normal")
    kept = [prune(started({**values, "c": values["c"] * scale}), PLAN, (0,), 0)["c"].kept for scale in (1e-6, 1, 1e6)]
    assert kept[0] == 1 < kept[1] < kept[2] == 15


def test_weights_with_a_pattern_or_a_sparsity_of_their_own_keep_their_counts() -> None:
    pruned = prune(started(), PLAN, (0,), 0)
    assert (pruned["rows"].kept, pruned["own"].kept) == (32, 10)
    layerwise = started()
    prune(layerwise, dataclasses.replace(PLAN, allocation="uniform"), (0,), 0)
    state = started()
    prune(state, PLAN, (0,), 0)
    assert all(torch.equal(state.bits[fqn], layerwise.bits[fqn]) for fqn in ("rows", "own"))


def test_pruning_a_sparse_group_again_changes_nothing() -> None:
    state = started()
    prune(state, PLAN, (0,), 0)
    before = copy.deepcopy(state)
    again = prune(state, PLAN, (0,), 0)
    assert all(torch.equal(state.bits[fqn], bits) for fqn, bits in before.bits.items())
    assert all(torch.equal(state.weights[fqn], value) for fqn, value in before.weights.items())
    assert {(facts.changed_bits, facts.delta2) for facts in again.values()} == {(0, 0.0)}


class Relative:
    """A criterion of somebody else, who looks at the whole weight."""

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return (
            weight.abs() / weight.abs().sum().clamp_min(1e-20) + 1e-3 * torch.rand(weight.shape, generator=generator)
        ).double()


@pytest.mark.parametrize("criterion", ["magnitude", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_keeps_the_same(kind: str, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(CRITERIA)["_entries"], "relative", Relative())
    plan, new = dataclasses.replace(PLAN, criterion=criterion), started(valued(kind))
    one = copy.deepcopy(new)
    told = prune(one, plan, (0,), 0)

    def check(peers: Peers) -> None:
        mine = at(peers, new)
        assert prune(mine, plan, (0,), 0).keys() == told.keys()
        assert [fqn for fqn in one.bits if not torch.equal(whole_bits(mine, fqn), one.bits[fqn])] == []
        for fqn in POOL:
            assert torch.equal(whole(mine, mine.weights, fqn), whole(one, one.weights, fqn))
        check_ranks_agree(mine)
        audit(mine, plan)

    for size in (1, 2, 3, 4):
        on_ranks(size, check)


def test_no_rank_is_given_more_than_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    new, seen = started(), list[int]()

    def watched(weight: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(weight.numel())
        return weight.abs()

    monkeypatch.setitem(vars(CRITERIA)["_entries"], "magnitude", watched)
    monkeypatch.setattr("gapfx.runtime.grow_prune.is_elementwise", lambda criterion: True)
    on_ranks(4, lambda peers: prune(at(peers, new), PLAN, (0,), 0))
    assert max(seen) == 32, "100 weights in slices of 8 x 4"


def test_the_audit_adds_up_the_weights_of_a_group() -> None:
    state = started()
    prune(state, PLAN, (0,), 0)
    counts = {fqn: count_kept(state.bits[fqn]) for fqn in POOL}
    assert counts != {"a": 20, "b": 31, "c": 6}, "the made-up weights move counts"
    found = audit(state, PLAN)
    assert found.sparsity == found.target
    first = int(masks(state)["b"].nonzero()[0])
    state.bits["b"][first // 8] &= 255 - (1 << first % 8)
    state.put_bits("b", state.bits["b"])
    with pytest.raises(AuditError, match=r"^the masks of a, b, c together keep 56 weights, their target is 57 on all"):
        audit(state, PLAN)


def test_weights_that_are_nan_are_named_before_the_group_is_pruned() -> None:
    state = started()
    state.weights["c"][3] = math.nan
    with pytest.raises(DivergedError, match=r"^1 of 15 scores of c are NaN"):
        prune(state, PLAN, (0,), 0)
    assert all(bool(mask.all()) for mask in masks(state).values())


def test_a_criterion_that_orders_one_weight_alone_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match="cannot compare weights by the criterion 'random'\n  to do: take --criterion"):
        started(plan=dataclasses.replace(PLAN, criterion="random"))
    started(plan=dataclasses.replace(PLAN, criterion="random", phases=()))
    started(plan=dataclasses.replace(PLAN, criterion="random", allocation="erk"))


FLAGS = ("--allocation", "global", "--clip", 0, "--rounds", 1)


def run(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *FLAGS, *flags) == 0
    return out


@pytest.mark.parametrize("flags", [(), ("--method", "pgap", "--groups", 2)], ids=["gap", "pgap"])
def test_both_forms_end_in_the_same_bits_and_tell_what_was_kept(flags: tuple[object, ...], tmp_path: Path) -> None:
    masked, compact = (run(tmp_path / form, "--form", form, *flags) for form in ("masked", "compact"))
    assert_same_bits(masked, compact)
    facts, plan = summary(compact), Plan.load(compact / "plan.json")
    kept = {fqn: told["kept"] for fqn, told in facts["per_weight"].items()}
    last = {fqn: told["kept"] for event in events(compact, "prune") for fqn, told in event["weights"].items()}
    assert kept == last
    assert all(int(weights(compact)[fqn].count_nonzero()) <= kept[fqn] for fqn in kept)
    planned = {weight.fqn: weight.numel - round(weight.numel * weight.sparsity) for weight in plan.weights()}
    assert kept != planned
    for group in plan.groups:
        assert sum(kept[w.fqn] for w in group.weights) == sum(planned[w.fqn] for w in group.weights)
    states = {state.fqn: state for state in weight_states(read_run(compact))}
    assert {fqn: state.kept for fqn, state in states.items()} == kept
    shared = [weight.fqn for group in plan.groups for pool in plan.pools(group) if len(pool) > 1 for weight in pool]
    assert shared
    assert all(states[fqn].target is None for fqn in shared)
    assert "shares out a group&#x27;s total" in (compact / "report.html").read_text().replace("&#39;", "&#x27;")


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run, resume = run(tmp_path / "whole"), list[object]()
    for num_steps in (5, 6):  # inside the first phase, inside the next
        with monkeypatch.context() as patch:
            _stop_after(patch, num_steps)
            stopped = gapfx("sparsify", TASK, "--out", tmp_path / "cut", *FLAGS, *resume)
        assert stopped == Interrupted.exit_code
        resume = ["--resume"]
    assert_same_bits(whole_run, run(tmp_path / "cut", "--resume"))


@pytest.mark.distributed
def test_ranks_with_replicas_end_with_the_masks_of_one_process(tmp_path: Path) -> None:
    flags = ("--method", "pgap", "--groups", 2, "--batch-size", 32, "--micro-batch", 8)
    one = weights(run(tmp_path / "one", *flags))
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "four", *FLAGS, *flags, "--nproc", 4, "--zero", 3)
    assert code == 0, err
    four = weights(tmp_path / "four")
    assert max(float((one[fqn] - four[fqn]).abs().max()) for fqn in one) <= 1e-6
    assert [fqn for fqn in one if not bool(((one[fqn] == 0) == (four[fqn] == 0)).all())] == []
