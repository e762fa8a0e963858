"""Whole runs in one process: what grows, what stays frozen, what is zero, and what a resumed run gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx import results, training
from gapfx.errors import Interrupted
from gapfx.masks import count_kept, unpack
from gapfx.plan import Plan
from gapfx.runtime import loop, steps
from gapfx.runtime.checkpoint import load_checkpoint
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.teams import Team
from tests.runs import TASK, assert_same_bits, events, gapfx, stops_in_evaluation, summary, weights


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
    grow = loop.grow

    def watch(state: TrainState, plan: Plan, groups: tuple[int, ...]) -> None:
        old = {fqn: bits.clone() for fqn, bits in state.bits.items()}
        grow(state, plan, groups)
        seen.append((len(seen), old, {fqn: whole(state, state.weights, fqn).clone() for fqn in state.weights}))

    monkeypatch.setattr(loop, "grow", watch)
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
    assert training.make_evaluate(task, settings, "val")(model.eval(), lambda: None) == facts["metrics"]["final"]
    for fqn, weight in facts["per_weight"].items():
        tensor = weights(run)[fqn]
        assert tensor.numel() == weight["numel"]
        assert int(tensor.count_nonzero()) <= weight["kept"] == weight["numel"] - round(weight["numel"] * 0.8)
    assert facts["sparsity_actual"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("method", ["dense", "static", "oneshot", "acdc", "gmp", "gap"])
def test_methods_take_equal_steps_and_end_at_their_sparsity(method: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--method", method)
    facts = summary(run)
    assert facts["phases"][-1]["stop"] == 64
    assert facts["sparsity_actual"] == pytest.approx(0.0 if method == "dense" else 0.8, abs=2e-3)


def test_gmp_prunes_step_by_step_along_a_cubic_and_is_audited_at_each(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--method", "gmp")
    prunes = events(run, "prune")
    depths = [1 - (1 - k / len(prunes)) ** 3 for k in range(1, len(prunes) + 1)]
    kept = [
        sum(w["kept"] for w in e["weights"].values()) / sum(w["numel"] for w in e["weights"].values()) for e in prunes
    ]
    assert len(prunes) == 6
    assert kept == pytest.approx([1 - 0.8 * depth for depth in depths], abs=2e-3)
    audits = events(run, "audit")
    assert [e["sparsity"] for e in audits[: len(prunes)]] == pytest.approx([1 - share for share in kept])
    assert all(e["sparsity"] == e["target"] for e in audits)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert_same_bits(first, second)
    other = train(tmp_path / "c", "--seed", 1)
    assert not torch.equal(weights(first)["head.weight"], weights(other)["head.weight"])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--state", "reset", "--phase-lr", "restart", "--dtype", "bf16"),
        ("--state", "carry", "--regrow-warmup", 3),
        ("--pattern", "2:4", "--sparsity", 0.5),
        ("--method", "gmp"),
        ("--landing", 4, "--growth", "saved"),
        ("--method", "set", "--update-steps", 4),
    ],
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


@pytest.mark.parametrize(
    ("number", "num_told", "message"),
    [
        (1, 0, "stopped after step 4; continue with --resume"),
        (2, 1, "stopped after step 8; continue with --resume"),
        (3, 2, "stopped after step 8; continue with --resume"),
        (13, 12, "stopped after step 40; continue with --resume"),
        (14, 13, "stopped in the last evaluation; continue with --resume"),
    ],
    ids=["inside a phase", "before a prune", "after a prune", "before the end", "of the finished model"],
)
@pytest.mark.parametrize("state", ["reset", "carry"])
def test_a_run_that_was_stopped_in_an_evaluation_makes_it_when_it_continues(
    number: int, num_told: int, message: str, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rounds", 1, "--eval-epochs", 0.25, "--keep-checkpoints", 1, "--state", state)
    whole, cut, task = train(tmp_path / "whole", *flags), tmp_path / "cut", stops_in_evaluation(tmp_path, number)
    assert gapfx("sparsify", task, "--out", cut, *flags) == Interrupted.exit_code
    assert message in capsys.readouterr().err
    assert len(events(cut, "eval")) == num_told
    assert gapfx("sparsify", task, "--out", cut, *flags, "--resume") == 0
    assert_same_bits(whole, cut)
    assert _course(whole) == _course(cut)
    assert summary(whole)["metrics"] == summary(cut)["metrics"]


def test_an_evaluation_that_is_stopped_twice_is_made_once(tmp_path: Path) -> None:
    flags = ("--rounds", 1, "--eval-epochs", 0.25)
    whole, cut, task = train(tmp_path / "whole", *flags), tmp_path / "cut", stops_in_evaluation(tmp_path, 2)
    assert gapfx("sparsify", task, "--out", cut, *flags) == Interrupted.exit_code
    task = stops_in_evaluation(tmp_path, 1)
    (tmp_path / "stopped").unlink()
    assert gapfx("sparsify", task, "--out", cut, *flags, "--resume") == Interrupted.exit_code
    assert gapfx("sparsify", task, "--out", cut, *flags, "--resume") == 0
    assert_same_bits(whole, cut)
    assert _course(whole) == _course(cut)


def _stop_after(patch: pytest.MonkeyPatch, num_steps: int) -> None:
    """As a Ctrl-C in the given step would."""
    agree, count = steps._agree, [0]  # pyright: ignore[reportPrivateUsage]

    def stop(team: Team, loss: float, asked: bool, step: int, seconds: float) -> tuple[float, bool, bool]:
        count[0] += 1
        return agree(team, loss, asked or count[0] >= num_steps, step, seconds)

    patch.setattr(steps, "_agree", stop)


def _course(run: Path) -> list[tuple[Any, ...]]:
    """Losses, prunes and metrics without times."""
    prunes = [(event["step"], str(event["groups"])) for event in events(run, "prune")]
    return (
        prunes
        + [(e["step"], e["loss"]) for e in events(run, "step")]
        + [(e["step"], e["metrics"]) for e in events(run, "eval")]
    )


def test_a_carried_optimizer_state_changes_the_run(tmp_path: Path) -> None:
    reset, carried = train(tmp_path / "reset", "--state", "reset"), train(tmp_path / "carry")
    assert not torch.equal(weights(reset)["head.weight"], weights(carried)["head.weight"])


def test_moments_of_pruned_weights_are_zero_when_carried(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--state", "carry", "--keep-checkpoints", 99)
    plan = Plan.load(run / "plan.json")
    for state in states(run):
        assert set(state.optimizer.moments) == {"exp_avg", "exp_avg_sq"}
        for moments in state.optimizer.moments.values():
            for weight in plan.weights():
                assert moments[weight.fqn].numel() == count_kept(state.bits[weight.fqn])


def test_moments_that_the_next_phase_would_forget_are_not_kept(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--state", "reset", "--keep-checkpoints", 99)
    assert [bool(state.optimizer.moments) for state in states(run)] == [False] * 6 + [True]


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


BREAKS_ONCE = """
from pathlib import Path
from tests.tasks.classify import *
from tests.tasks.classify import loss as plain_loss
SEEN = Path(__file__).with_name("broke")
calls = [0]


def loss(model, batch):
    calls[0] += model.training
    value = plain_loss(model, batch)
    if calls[0] == 22 and not SEEN.exists():
        SEEN.touch()
        weight = next(model.parameters())
        return {broken}
    return value
"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("value * float('nan')", "the loss is nan at step"),
        ("value * float('inf')", "the loss is inf at step"),
        ("value + (weight.sum() * 0).abs().sqrt()", ", or a gradient is"),
    ],
    ids=["NaN", "infinite", "a number without a gradient"],
)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_run_that_diverged_once_continues_to_the_same_bits(
    zero: int, broken: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, flags = tmp_path / "task.py", ("--rounds", 1, "--checkpoint-every", 1, "--zero", zero)
    task.write_text(BREAKS_ONCE.replace("{broken}", broken))
    assert gapfx("sparsify", task, "--out", tmp_path / "cut", *flags) == 2
    assert message in capsys.readouterr().err
    assert gapfx("sparsify", task, "--out", tmp_path / "cut", *flags, "--resume") == 0
    assert_same_bits(train(tmp_path / "whole", *flags), tmp_path / "cut")


def test_the_peak_of_memory_is_that_of_all_processes_to_the_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "peak_resident_bytes", lambda: 5 * 2**40)
    run = train(tmp_path / "run", "--rounds", 1)
    monkeypatch.undo()
    (run / "checkpoints" / "step-00000040" / "state.json").unlink()
    train(run, "--rounds", 1, "--resume")
    assert summary(run)["peak_rss_bytes_by_rank"] == [5 * 2**40]
    monkeypatch.setattr(results, "peak_resident_bytes", iter([1, 6 * 2**40]).__next__)
    train(run, "--rounds", 1, "--resume")
    assert summary(run)["peak_rss_bytes"] == 6 * 2**40


def test_a_run_that_falls_back_to_an_older_checkpoint_says_what_was_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = train(tmp_path / "whole", "--rounds", 1), train(tmp_path / "cut", "--rounds", 1)
    (cut / "checkpoints" / "step-00000040" / "rank-00000.safetensors").unlink()
    train(cut, "--rounds", 1, "--resume")
    [told] = events(cut, "fallback")
    assert told["step"] == 24
    assert "step-00000040 is damaged: " in told["problem"]
    assert "rank-00000.safetensors" in told["problem"]
    assert "step-00000040 is damaged: " in capsys.readouterr().out
    assert_same_bits(whole, cut)


def test_an_audit_stands_at_the_end_of_every_phase(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    told = events(run, "audit")
    assert [event["step"] for event in told] == [phase.stop for phase in Plan.load(run / "plan.json").phases]
    assert all(event["sparsity"] == event["target"] and len(event["masks"]) == 64 for event in told)


def test_explored_weights_reach_all_after_one_round(tmp_path: Path) -> None:
    shares = [event["explored"] for event in events(train(tmp_path / "run"), "prune")]
    assert shares == sorted(shares)
    assert shares[2] == 1.0
    assert shares[0] < 1.0
