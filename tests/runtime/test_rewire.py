"""What SET, RigL and GaP exchange, and that ranks, ZeRO stages, forms and a resume change nothing."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx.errors import DivergedError, Interrupted, UserError
from gapfx.masks import unpack
from gapfx.plan import Plan
from gapfx.runtime import gradients, grow_prune, loop, rewire
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.steps import PhaseRun
from tests.runs import TASK, assert_same_bits, events, finish, gapfx, weights
from tests.tasks import classify

# 48 steps; updates every 8.
FLAGS = ("--phase-epochs", 0.25, "--rounds", 2, "--finetune-epochs", 1.5)
METHODS = {
    "set": ("--method", "set", "--update-steps", 8),
    "rigl": ("--method", "rigl", "--update-steps", 8),
    "gap": ("--method", "gap", "--exchange", 0.3),
}


@dataclass
class Update:
    """Masks and weights before and after one update of a run, and the gradient of the dense weights before it."""

    drop: float
    regrow: str
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    values: dict[str, Tensor]
    new_values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def masks_of(state: TrainState) -> dict[str, Tensor]:
    return {fqn: unpack(bits, state.layout[fqn].shape) for fqn, bits in state.bits.items()}


def values_of(state: TrainState) -> dict[str, Tensor]:
    return {fqn: whole(state, state.weights, fqn).clone() for fqn in state.weights}


def plain_gradients(run: PhaseRun, state: TrainState) -> dict[str, Tensor]:
    """Of the plain model with the masked weights, on the batch of the state's step."""
    model = classify.model()
    model.load_state_dict(values_of(state))
    (batch,) = next(run.job.feed.steps(state.step, state.step + 1))
    classify.loss(model.train(), batch).backward()
    return {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """Every update that runs in this process make."""
    seen: list[Update] = []

    def watched(run: PhaseRun, state: TrainState) -> int:
        before, values, gradients = masks_of(state), values_of(state), plain_gradients(run, state)
        changed = rewire.rewire(run, state)
        rest = before, masks_of(state), values, values_of(state), gradients
        seen.append(Update(run.phase.drop, run.phase.regrow, *rest))
        return changed

    monkeypatch.setattr(loop, "rewire", watched)
    return seen


def train(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *FLAGS, *flags) == 0
    return out


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_live_weights_are_dropped_and_as_many_regrown_at_zero(
    method: str, tmp_path: Path, updates: list[Update]
) -> None:
    run = train(tmp_path / "run", *METHODS[method])
    assert len(updates) == sum(phase.drop > 0 for phase in Plan.load(run / "plan.json").phases) > 3
    for update in updates:
        for fqn, before in update.before.items():
            after, value = update.after[fqn], update.values[fqn].abs()
            assert after.sum() == before.sum()
            lost, stayed = before & ~after, before & after
            assert lost.sum() <= int(update.drop * before.sum())
            if lost.any():
                least = value[before].sort().values[: int(update.drop * before.sum())]
                assert value[lost].max() <= least.max()
            assert torch.equal(update.new_values[fqn][stayed], update.values[fqn][stayed])
            assert not update.new_values[fqn][~stayed].any()


def test_rigl_regrows_what_has_the_largest_gradient_of_the_dense_weight(tmp_path: Path, updates: list[Update]) -> None:
    train(tmp_path / "run", *METHODS["rigl"])
    num_grown = 0
    for update in updates:
        assert update.regrow == "gradient"
        for fqn, before in update.before.items():
            kept = before & (update.values[fqn].abs() > _weakest_kept(update, fqn))
            grown = update.after[fqn] & ~kept
            steep = update.gradients[fqn].abs()
            others = ~kept & ~grown
            if grown.any():
                assert steep[grown].min() >= steep[others].max() * (1 - 1e-4)
                num_grown += 1
    assert num_grown > 20


def _weakest_kept(update: Update, fqn: str) -> float:
    live = update.values[fqn].abs()[update.before[fqn]].sort().values
    num = int(update.drop * len(live))
    return float(live[num - 1]) if num else -1.0


def test_one_group_at_a_time_is_dense_for_its_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[tuple[int, ...]] = []

    def watched(state: TrainState, plan: Plan, groups: tuple[int, ...]) -> None:
        grown.append(groups)
        grow_prune.grow(state, plan, groups)

    monkeypatch.setattr(gradients, "grow", watched)
    plan = Plan.load(train(tmp_path / "run", *METHODS["rigl"]) / "plan.json")
    assert grown == [(group,) for phase in plan.phases if phase.drop for group in range(3)]


def test_set_regrows_others_than_rigl_and_each_update_draws_anew(tmp_path: Path, updates: list[Update]) -> None:
    train(tmp_path / "run", *METHODS["set"])
    assert {update.regrow for update in updates} == {"random"}
    grown = [update.after[fqn] & ~update.before[fqn] for update in updates[:2] for fqn in ("blocks.0.up.weight",)]
    assert grown[0].any()
    assert not torch.equal(*grown)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_blocks_stay_blocks(method: str, tmp_path: Path, updates: list[Update]) -> None:
    train(tmp_path / "run", *METHODS[method], "--pattern", "block:4x1")
    for update in updates:
        for fqn, after in update.after.items():
            live = after.view(-1, 4, after.shape[1])
            assert torch.equal(live.any(1), live.all(1)), fqn
            before = update.before[fqn]
            assert after.sum() == before.sum()
            assert (before & ~after).sum() <= update.drop * before.sum() + 4  # to the nearest block


def test_an_update_is_told_and_is_no_reason_to_evaluate(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *METHODS["rigl"], "--eval-epochs", 0)
    assert [event["step"] for event in events(run, "eval")] == [48]
    phases = events(run, "phase")
    assert "drop" not in phases[0]
    assert [event["regrow"] for event in phases[1:]] == ["gradient"] * (len(phases) - 1)
    assert all(event["changed_bits"] > 0 for event in phases[1:3])


def test_a_group_that_is_about_to_grow_exchanges_nothing_and_each_prune_is_evaluated(
    tmp_path: Path, updates: list[Update]
) -> None:
    run = train(tmp_path / "run", *METHODS["gap"], "--eval-epochs", 0)
    plan = Plan.load(run / "plan.json")
    exchanging = [phase for phase in plan.phases if phase.drop]
    for phase, update in zip(exchanging, updates, strict=True):
        changed = _groups_changed(plan, update)
        assert not changed & set(phase.grow)
        assert changed or phase.drop < 0.1  # later a share may be less than one weight
    pruned = [phase.stop for phase in plan.phases if phase.prune]
    assert [event["step"] for event in events(run, "eval")] == [*sorted(pruned * 2), plan.num_steps]  # around each


def _groups_changed(plan: Plan, update: Update) -> set[int]:
    groups = plan.group_of()
    return {groups[fqn] for fqn, before in update.before.items() if not torch.equal(before, update.after[fqn])}


@pytest.mark.parametrize("method", METHODS)
def test_both_forms_end_in_the_same_bits(method: str, tmp_path: Path) -> None:
    flags = (*METHODS[method], "--clip", 0)
    runs = [train(tmp_path / form, *flags, "--form", form, "--kernels", "expand") for form in ("compact", "masked")]
    assert_same_bits(*runs)


@pytest.mark.parametrize("method", ["rigl", "gap"])
def test_a_resumed_run_ends_in_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run = train(tmp_path / "whole", *METHODS[method])
    told = [0]

    def asked() -> bool:
        told[0] += 1
        return told[0] == 17  # the first step of a phase that has exchanged weights

    job = loop.train

    def stopped(given: loop.Job, state: TrainState) -> TrainState:
        return job(dataclasses.replace(given, should_stop=asked), state)

    with monkeypatch.context() as patch:
        patch.setattr("gapfx.training.train", stopped)
        code = gapfx("sparsify", TASK, "--out", tmp_path / "cut", *FLAGS, *METHODS[method])
    assert code == Interrupted.exit_code
    assert_same_bits(whole_run, train(tmp_path / "cut", *METHODS[method], "--resume"))


def test_a_gradient_that_is_no_number_ends_the_run_with_its_weight_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rewire.dense_gradients

    def spoiled(*arguments: Any) -> dict[str, Tensor]:
        return {fqn: gradient.fill_(math.nan) for fqn, gradient in found(*arguments).items()}

    monkeypatch.setattr(rewire, "dense_gradients", spoiled)
    code = gapfx("sparsify", TASK, "--out", tmp_path / "run", *FLAGS, *METHODS["rigl"])
    assert code == DivergedError.exit_code
    assert re.search(r"\d+ of \d+ scores of stem.weight are NaN at step 8\n", capsys.readouterr().err)


def test_a_pattern_without_shares_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gapfx("sparsify", TASK, "--out", tmp_path / "run", *FLAGS, *METHODS["rigl"], "--pattern", "2:4")
    assert code == UserError.exit_code
    assert "of which no share can be dropped and regrown" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_end_as_one_does(zero: int, method: str, tmp_path: Path) -> None:
    flags = (*FLAGS, *METHODS[method], "--batch-size", 32, "--micro-batch", 16, "--seed", 1)
    for name, more in (("one", ()), ("two", ("--nproc", 2, "--zero", zero))):
        code, _, err = finish("sparsify", TASK, "--out", tmp_path / name, *flags, *more)
        assert code == 0, err
    two = weights(tmp_path / "two")
    for fqn, weight in weights(tmp_path / "one").items():
        assert torch.equal(weight == 0, two[fqn] == 0), fqn
        torch.testing.assert_close(weight, two[fqn], rtol=1e-4, atol=1e-5)
