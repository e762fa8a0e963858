"""Weights that are kept for later: rewinding, and growth from the values that a prune has taken."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gapfx.estimate import Setup, Sizes, estimate
from gapfx.masks import unpack
from gapfx.plan import Phase, Plan
from gapfx.runtime import loop
from gapfx.runtime.grow_prune import PrunedWeight
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.steps import PhaseRun
from tests.runs import TASK, assert_same_bits, finish, gapfx, weights

FLAGS = ("--phase-epochs", 0.25, "--rounds", 2, "--finetune-epochs", 0.5, "--sparsity", 0.9)


@dataclass
class Boundary:
    """All weights, and the masks in force: where a phase's training begins, where it ends, and after its prune."""

    phase: Phase
    num_aside: int = 0
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])

    def note(self, when: str, state: TrainState) -> None:
        self.values[when] = {fqn: whole(state, state.weights, fqn).clone() for fqn in state.weights}
        self.masks[when] = {fqn: unpack(bits, state.layout[fqn].shape) for fqn, bits in state.bits.items()}


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[Boundary]:
    """Every phase that runs in this process train."""
    seen: list[Boundary] = []
    trains, prunes = loop.train_phase, loop.prune_phase

    def trained(run: PhaseRun, state: TrainState) -> frozenset[str]:
        seen.append(Boundary(run.phase, sum(value.numel() for value in state.aside.values())))
        seen[-1].note("start", state)
        fqns = trains(run, state)
        seen[-1].note("stop", state)
        return fqns

    def pruned(run: PhaseRun, state: TrainState) -> dict[str, PrunedWeight]:
        facts = prunes(run, state)
        seen[-1].note("pruned", state)
        return facts

    monkeypatch.setattr(loop, "train_phase", trained)
    monkeypatch.setattr(loop, "prune_phase", pruned)
    return seen


def train(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *FLAGS, *flags) == 0
    return out


def test_imp_goes_back_to_the_early_weights_under_ever_smaller_masks(tmp_path: Path, phases: list[Boundary]) -> None:
    train(tmp_path / "run", "--method", "imp")
    early = phases[0].values["stop"]
    rewound = [each for each in phases if each.phase.rewind]
    assert len(rewound) == 6
    for before, after in zip(phases[1:], rewound, strict=False):
        for fqn, value in after.values["start"].items():
            mask = after.masks["start"].get(fqn, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, early[fqn] * mask), fqn
        for fqn, mask in after.masks["start"].items():
            assert torch.equal(mask, before.masks["pruned"][fqn])
            assert not (mask & ~before.masks["start"][fqn]).any()
    live = [sum(int(m.sum()) for m in each.masks["start"].values()) for each in rewound]
    total = sum(mask.numel() for mask in rewound[0].masks["start"].values())
    assert [count / total for count in live] == pytest.approx([0.1 ** (k / 6) for k in range(1, 7)], abs=0.002)


@pytest.mark.parametrize("flags", [("gap",), ("acdc",), ("gap", "--landing", 4)])
def test_saved_growth_brings_back_what_the_prunes_since_the_last_growth_have_taken(
    flags: tuple[object, ...], tmp_path: Path, phases: list[Boundary]
) -> None:
    train(tmp_path / "run", "--growth", "saved", "--method", *flags)
    saved: dict[str, Tensor] = {}
    num_back = 0
    for each in phases:
        for fqn in [fqn for fqn, mask in each.masks["start"].items() if bool(mask.all())]:
            value = each.values["start"][fqn]
            taken = saved.pop(fqn, torch.zeros_like(value))
            was_masked = taken != 0
            assert torch.equal(value[was_masked], taken[was_masked])
            num_back += int(was_masked.sum())
        for fqn, mask in each.masks["pruned"].items() if each.phase.prune else ():
            taken = each.values["stop"][fqn] * (each.masks["start"][fqn] & ~mask)
            saved[fqn] = saved[fqn] + taken if fqn in saved else taken
    assert num_back > 1000


@pytest.mark.parametrize("flags", [("imp",), ("gap", "--growth", "saved"), ("acdc", "--growth", "saved")])
def test_a_forecast_counts_what_is_kept_aside(flags: tuple[str, ...], tmp_path: Path, phases: list[Boundary]) -> None:
    run = train(tmp_path / "run", "--method", *flags)
    plan = Plan.load(run / "plan.json")
    sizes = Sizes.of(plan, sum(value.numel() for value in weights(run).values()))
    told = [each.rank.aside / 4 for each in estimate(plan, sizes, Setup())]
    assert told == [each.num_aside for each in phases]
    assert max(told) > 0


def test_growth_from_zero_keeps_nothing_aside(tmp_path: Path, phases: list[Boundary]) -> None:
    train(tmp_path / "run", "--method", "gap")
    last_masks: dict[str, Tensor] = {}
    for each in phases:
        for fqn, mask in last_masks.items():
            assert not each.values["start"][fqn][~mask].count_nonzero()
        last_masks = each.masks["pruned"]
    assert any(bool(mask.all()) for each in phases[3:] for mask in each.masks["start"].values())


CASES = [("imp",), ("gap", "--growth", "saved")]


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: flags[0])
def test_a_resumed_run_ends_in_the_same_bits(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run = train(tmp_path / "whole", "--method", *flags)
    told, job = [0], loop.train

    def asked() -> bool:
        told[0] += 1
        return told[0] == 31  # in the second round, with weights aside

    def stopped(given: loop.Job, state: TrainState) -> TrainState:
        return job(dataclasses.replace(given, should_stop=asked), state)

    with monkeypatch.context() as patch:
        patch.setattr("gapfx.training.train", stopped)
        assert gapfx("sparsify", TASK, "--out", tmp_path / "cut", *FLAGS, "--method", *flags) == 130
    assert_same_bits(whole_run, train(tmp_path / "cut", "--method", *flags, "--resume"))


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("flags", CASES, ids=lambda flags: flags[0])
def test_two_ranks_keep_and_take_back_what_one_does(flags: tuple[str, ...], zero: int, tmp_path: Path) -> None:
    one = train(tmp_path / "one", "--method", *flags, "--micro-batch", 16)
    more = ("--method", *flags, "--nproc", 2, "--micro-batch", 16, "--zero", zero)
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "two", *FLAGS, *more)
    assert code == 0, err
    ours, theirs = weights(one), weights(tmp_path / "two")
    for fqn, value in ours.items():
        torch.testing.assert_close(value, theirs[fqn], rtol=1e-4, atol=1e-5)
