"""Parallel GaP: replicas in turn or side by side give the same model, and what nobody owns is their mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.runtime.grow_prune import grow, layout_of, prune, start_masks
from gapfx.runtime.ranks import Peers
from gapfx.runtime.replicas import Merge, for_team
from gapfx.runtime.state import OptimizerState, TrainState, whole, whole_bits
from gapfx.runtime.teams import Team
from tests.runs import TASK, assert_same_bits, events, finish, gapfx, summary, weights
from tests.runtime.threads import at, on_ranks

PARALLEL = ("--method", "pgap", "--groups", 2, "--batch-size", 32, "--micro-batch", 8, "--clip", 0)
A, B, C = Weight("a", (8, 10), 0.8), Weight("b", (16, 4), 0.5), Weight("c", (4, 10), 0.6)
PLAN = Plan((Group("one", (A,)), Group("two", (B,)), Group("three", (C,))))
PHASE = Phase("p", 0, 5, (0, 1), (0, 1), replicas=2)


def start() -> TrainState:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a": (8, 10), "b": (16, 4), "c": (4, 10), "bias": (6,), "frozen": (3,)}
    state = TrainState(layout_of(shapes, PLAN), {fqn: torch.randn(shape).flatten() for fqn, shape in shapes.items()})
    state.buffers = {"mean": torch.randn(3), "count": torch.tensor(4)}
    start_masks(state, PLAN, 0)
    return state


TRAINED = frozenset({"a", "b", "c", "bias"})


def trained(state: TrainState, replica: int) -> TrainState:
    """What a phase of one replica leaves: a function of the start and the replica alone."""
    grow(state, PLAN, PHASE.grown_by(replica))
    for fqn in TRAINED:
        noise = torch.randn(state.num_live(fqn), generator=torch.Generator().manual_seed(10 * replica + len(fqn)))
        state.weights[fqn] = state.weights[fqn] + noise
    moments = {fqn: state.weights[fqn] * 2 for fqn in TRAINED}
    state.optimizer = OptimizerState({"exp_avg": moments}, [{"step": (5.0 + replica, True)}])
    state.buffers = {"mean": state.buffers["mean"] + replica, "count": state.buffers["count"] + 5 + replica}
    state.step = 5
    prune(state, PLAN, PHASE.grown_by(replica), 0)
    return state


def merged_in_turn() -> TrainState:
    state = start()
    merge = Merge(PLAN, PHASE, state)
    for turn in range(2):
        mine = trained(for_team(state, Peers()), turn)
        merge.add(mine, Team(Peers()), turn, TRAINED)
    merge.finish()
    return state


def test_owned_weights_come_from_their_replica_and_the_rest_is_the_mean() -> None:
    first, second, state = trained(start(), 0), trained(start(), 1), merged_in_turn()
    for fqn, owner in (("a", first), ("b", second)):
        assert torch.equal(state.weights[fqn], owner.weights[fqn])
        assert torch.equal(state.bits[fqn], owner.bits[fqn])
        assert torch.equal(state.sparse_bits[fqn], owner.bits[fqn])
        assert torch.equal(state.optimizer.moments["exp_avg"][fqn], owner.optimizer.moments["exp_avg"][fqn])
    for fqn in ("c", "bias"):
        assert torch.allclose(state.weights[fqn], (first.weights[fqn] + second.weights[fqn]) / 2)
        moments = [one.optimizer.moments["exp_avg"][fqn] for one in (first, second)]
        assert torch.allclose(state.optimizer.moments["exp_avg"][fqn], (moments[0] + moments[1]) / 2)
    assert torch.equal(state.bits["c"], start().bits["c"])
    assert torch.equal(state.weights["frozen"], start().weights["frozen"])
    assert torch.allclose(state.buffers["mean"], (first.buffers["mean"] + second.buffers["mean"]) / 2)
    assert int(state.buffers["count"]) == 9
    assert state.optimizer.scalars == [{"step": (5.0, True)}]
    assert state.step == 5


def test_teams_side_by_side_merge_as_in_turn() -> None:
    expected, new = merged_in_turn(), start()

    def check(peers: Peers) -> int:
        state = at(peers, new)
        mine = trained(for_team(new, Peers()), peers.rank)
        merge = Merge(PLAN, PHASE, state)
        merge.add(mine, Team(Peers(), peers.rank, 2), 0, TRAINED)
        merge.finish()
        for fqn in state.weights:
            ours = whole(state, state.weights, fqn)
            assert torch.allclose(ours, whole(expected, expected.weights, fqn), atol=1e-6), fqn
        assert all(torch.equal(whole_bits(state, fqn), expected.bits[fqn]) for fqn in expected.bits)
        assert torch.allclose(state.buffers["mean"], expected.buffers["mean"])
        assert (state.optimizer.scalars, state.step) == (expected.optimizer.scalars, 5)
        return state.peers.size

    assert on_ranks(2, check) == [2, 2]


def test_a_copy_for_a_team_leaves_the_state_as_it_is() -> None:
    state = start()
    before = {fqn: value.clone() for fqn, value in state.weights.items()}
    trained(for_team(state, Peers()), 1)
    assert all(torch.equal(state.weights[fqn], value) for fqn, value in before.items())
    assert state.step == 0


def run(out: Path, *flags: object) -> Path:
    if "--nproc" not in flags:
        assert gapfx("sparsify", TASK, "--out", out, *PARALLEL, *flags) == 0
        return out
    code, _, err = finish("sparsify", TASK, "--out", out, *PARALLEL, *flags)
    assert code == 0, err
    return out


def test_a_run_in_turn_ends_sparse_and_tells_of_all_groups(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    assert summary(made)["sparsity_actual"] == pytest.approx(0.8, abs=2e-3)
    assert [len(event["weights"]) for event in events(made, "prune")] == [len(summary(made)["per_weight"])] * 2
    told = [event["step"] for event in events(made, "step")]
    assert told == sorted(set(told)), "the first replica stands for all"
    assert [event["explored"] for event in events(made, "prune")] == [1.0, 1.0]


def test_both_forms_end_in_the_same_bits(tmp_path: Path) -> None:
    assert_same_bits(*(run(tmp_path / form, "--form", form, "--state", "reset") for form in ("masked", "compact")))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags",
    [("--nproc", 2), ("--nproc", 4, "--form", "compact"), ("--nproc", 4, "--zero", 3)],
    ids=["2 replicas of 1", "2 replicas of 2", "2 replicas of 2 at stage 3"],
)
def test_replicas_side_by_side_end_as_in_turn(flags: tuple[object, ...], tmp_path: Path) -> None:
    ours, theirs = (weights(run(tmp_path / str(len(f)), *f, "--state", "carry")) for f in ((), flags))
    assert max(float((ours[fqn] - theirs[fqn]).abs().max()) for fqn in ours) <= 1e-6
    assert [fqn for fqn in ours if not bool(((ours[fqn] == 0) == (theirs[fqn] == 0)).all())] == []


@pytest.mark.distributed
def test_three_replicas_on_three_ranks_and_on_two_end_as_in_turn(tmp_path: Path) -> None:
    flags = ("--groups", 3, "--batch-size", 24, "--micro-batch", 4)
    one = weights(run(tmp_path / "one", *flags))
    for nproc in (2, 3):
        other = weights(run(tmp_path / str(nproc), *flags, "--nproc", nproc))
        # Two ranks share the batch of each replica, whose gradients add up in another order: 1.5e-6 apart at the end.
        assert max(float((one[fqn] - other[fqn]).abs().max()) for fqn in one) <= 4e-6
        assert [fqn for fqn in one if not bool(((one[fqn] == 0) == (other[fqn] == 0)).all())] == []


@pytest.mark.distributed
def test_four_replicas_of_one_rank_end_as_in_turn(tmp_path: Path) -> None:
    flags = ("--groups", 4, "--rounds", 1, "--finetune-epochs", 0.5)
    one, four = (run(tmp_path / name, *flags, *more) for name, more in (("one", ()), ("four", ("--nproc", 4))))
    assert [phase["replicas"] for phase in summary(four)["phases"]] == [4, 1]
    ours, theirs = weights(one), weights(four)
    assert max(float((ours[fqn] - theirs[fqn]).abs().max()) for fqn in ours) <= 1e-6
    assert [fqn for fqn in ours if not bool(((ours[fqn] == 0) == (theirs[fqn] == 0)).all())] == []
