"""Whole runs in one process: what grows, what stays frozen, what is zero, and what a resumed run gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx import training
from gapfx.errors import Interrupted
from gapfx.masks import unpack
from gapfx.plan import Plan
from gapfx.runtime import loop
from gapfx.runtime.checkpoint import load_checkpoint
from gapfx.runtime.grow_prune import TrainState
from tests.runs import TASK, assert_same_bits, events, gapfx, summary, weights


def train(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *flags) == 0
    return out


def states(run: Path) -> list[TrainState]:
    """The kept checkpoints, oldest first; reading one deletes the newest, so that the next call sees the one before."""
    found: list[TrainState] = []
    for path in sorted((run / "checkpoints").iterdir(), reverse=True):
        loaded = load_checkpoint(run / "checkpoints")
        assert loaded is not None
        found.insert(0, loaded[0])
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return found


def test_each_phase_changes_only_the_masks_of_its_group(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--keep-checkpoints", 99)
    plan = Plan.load(run / "plan.json")
    ends = states(run)
    group_of = plan.group_of()
    for phase, before, after in zip(plan.phases[1:], ends[:-1], ends[1:], strict=True):
        changed = {group_of[fqn] for fqn in group_of if not torch.equal(before.bits[fqn], after.bits[fqn])}
        assert changed <= set(phase.grow)
    moved = [g for g in group_of.values() if any(g in p.grow for p in plan.phases)]
    assert set(moved) == set(range(len(plan.groups)))


def test_the_first_group_starts_as_initialised_and_later_ones_grow_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
    enter = loop._enter  # pyright: ignore[reportPrivateUsage]

    def watch(run: Any, state: TrainState) -> None:
        old = {fqn: bits.clone() for fqn, bits in state.bits.items()}
        enter(run, state)
        seen.append((run.index, old, {fqn: w.clone() for fqn, w in state.weights.items()}))

    monkeypatch.setattr(loop, "_enter", watch)
    run = train(tmp_path / "run", "--rounds", 1)
    plan = Plan.load(run / "plan.json")
    for index, old_bits, values in seen:
        for group in plan.phases[index].grow:
            for weight in plan.groups[group].weights:
                new = ~unpack(old_bits[weight.fqn], weight.shape)
                assert new.sum() == (round(weight.numel * weight.sparsity) if index else 0)
                assert values[weight.fqn][new].count_nonzero() == 0
    first = values_at_start(plan, seen)
    assert all(value.count_nonzero() == value.numel() for value in first)


def values_at_start(plan: Plan, seen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]) -> list[Tensor]:
    """Weights of the first group when the first phase began."""
    return [seen[0][2][weight.fqn] for weight in plan.groups[0].weights]


def test_the_exported_model_has_exact_zeros_and_the_reported_metric(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    facts = summary(run)
    from gapfx.settings import Settings, merge
    from gapfx.task import load_task

    task = load_task(TASK)
    model = task.model()
    model.load_state_dict(weights(run), strict=True)
    settings: Settings = merge(("defaults", task.defaults))
    assert training.make_evaluate(task, settings)(model.eval()) == facts["metrics"]["final"]
    for fqn, weight in facts["per_weight"].items():
        tensor = weights(run)[fqn]
        assert tensor.numel() == weight["numel"]
        assert int(tensor.count_nonzero()) <= weight["kept"] == weight["numel"] - round(weight["numel"] * 0.8)
    assert facts["sparsity_actual"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("method", ["dense", "static", "oneshot", "gap"])
def test_methods_take_equal_steps_and_end_at_their_sparsity(method: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--method", method)
    facts = summary(run)
    assert facts["phases"][-1]["stop"] == 64
    assert facts["sparsity_actual"] == pytest.approx(0.0 if method == "dense" else 0.8, abs=2e-3)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert_same_bits(first, second)
    other = train(tmp_path / "c", "--seed", 1)
    assert not torch.equal(weights(first)["head.weight"], weights(other)["head.weight"])


@pytest.mark.parametrize(
    "flags", [(), ("--state", "carry", "--dtype", "bf16"), ("--pattern", "2:4", "--sparsity", 0.5)]
)
def test_a_stopped_run_continues_bit_for_bit(
    flags: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--rounds", 1, *flags)
    whole = train(tmp_path / "whole", *flags)
    resume: tuple[object, ...] = ()
    for num_steps in (3, 5, 6):  # inside a phase, at its last step, inside the next
        with monkeypatch.context() as patch:
            _stop_after(patch, num_steps)
            assert gapfx("sparsify", TASK, "--out", tmp_path / "cut", *flags, *resume) == Interrupted.exit_code
        resume = ("--resume",)
    cut = train(tmp_path / "cut", "--resume", *flags)
    assert_same_bits(whole, cut)
    assert _course(whole) == _course(cut)


def _stop_after(patch: pytest.MonkeyPatch, num_steps: int) -> None:
    """As a Ctrl-C in the given step would."""
    agree, count = loop._agree, [0]  # pyright: ignore[reportPrivateUsage]

    def stop(loss: float, asked: bool) -> tuple[float, bool]:
        count[0] += 1
        return agree(loss, asked or count[0] >= num_steps)

    patch.setattr(loop, "_agree", stop)


def _course(run: Path) -> list[tuple[Any, ...]]:
    """Losses and metrics without times."""
    return [(e["step"], e["loss"]) for e in events(run, "step")] + [
        (e["step"], e["metrics"]) for e in events(run, "eval")
    ]


def test_a_carried_optimizer_state_changes_the_run(tmp_path: Path) -> None:
    reset, carried = train(tmp_path / "reset"), train(tmp_path / "carry", "--state", "carry")
    assert not torch.equal(weights(reset)["head.weight"], weights(carried)["head.weight"])


def test_moments_of_pruned_weights_are_zero_when_carried(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--state", "carry", "--keep-checkpoints", 99)
    plan = Plan.load(run / "plan.json")
    for state in states(run):
        for moments in state.optimizer.moments.values():
            for weight in plan.weights():
                dead = ~unpack(state.bits[weight.fqn], weight.shape)
                assert moments[weight.fqn][dead].count_nonzero() == 0


def test_a_diverging_run_keeps_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "task.py"
    text = TASK.read_text().replace("def loss(", "calls = [0]\n\n\ndef loss(")
    text = text.replace(
        "    return F.cross",
        "    calls[0] += model.training\n    return (float('nan') if calls[0] > 22 else 1) * F.cross",
    )
    task.write_text(text)
    assert gapfx("sparsify", task, "--out", tmp_path / "run") == 2
    assert "the loss is nan at step 20" in capsys.readouterr().err
    loaded = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    assert loaded[0].step == 16
    assert all(bool(torch.isfinite(weight).all()) for weight in loaded[0].weights.values())


def test_explored_weights_reach_all_after_one_round(tmp_path: Path) -> None:
    shares = [event["explored"] for event in events(train(tmp_path / "run"), "prune")]
    assert shares == sorted(shares)
    assert shares[2] == 1.0
    assert shares[0] < 1.0
