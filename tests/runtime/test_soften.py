"""Soft thresholds: the formula, gradients straight through, and that ranks, stages and a resume change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.runtime import loop
from gapfx.runtime.feed import Feed
from gapfx.runtime.learning_rate import warmup_cosine
from gapfx.runtime.soften import Softening, soft_threshold
from gapfx.runtime.state import TrainState
from tests.runs import TASK, assert_same_bits, finish, gapfx, summary, weights
from tests.tasks import classify

FLAGS = ("--method", "st3", "--phase-epochs", 0.25, "--rounds", 1, "--finetune-epochs", 0.5, "--clip", 0)
WIDE = ("--groups", 1, "--allocation", "global")


def train(out: Path, *flags: object) -> Path:
    assert gapfx("sparsify", TASK, "--out", out, *FLAGS, *flags) == 0
    return out


def by_hand(weight: Tensor, threshold: float) -> Tensor:
    """The authors' formula, element by element."""
    out = torch.zeros_like(weight)
    for index, row in enumerate(weight):
        live = [float(w) if abs(float(w)) > threshold else 0.0 for w in row.flatten()]
        ratio = (sum(map(abs, live)) / len(live) + 1e-6) / (float(row.abs().mean()) + 1e-6)
        scale = 1.01 / (ratio + 0.01)
        shrunk = [scale * (w - (w > 0) * threshold + (w < 0) * threshold) if w else 0.0 for w in live]
        out[index] = torch.tensor(shrunk).view(row.shape)
    return out


@given(st.integers(0, 23), st.integers(0, 10))
def test_one_threshold_over_several_weights_shrinks_what_is_above_it(num_kept: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, 2, 2, generator=generator), torch.randn(4, 3, generator=generator)
    softened = soft_threshold([a, b], num_kept)
    assert sum(int(value.count_nonzero()) for value in softened) == num_kept
    threshold = float(torch.cat([a.flatten(), b.flatten()]).abs().sort().values[23 - num_kept])
    for weight, value in zip((a, b), softened, strict=True):
        torch.testing.assert_close(value, by_hand(weight, threshold), rtol=1e-4, atol=1e-5)


def test_nothing_is_shrunk_while_nothing_is_pruned() -> None:
    weight = torch.randn(3, 4)
    torch.testing.assert_close(soft_threshold([weight], 12)[0], weight)


def test_the_sparsity_rises_along_a_cubic_and_stays() -> None:
    plan = Plan((Group("g", (Weight("w", (4, 5), 0.8),)),))
    ramp = Softening.of(plan, Phase("p", 100, 200, (0,), soften="ramp"))
    assert [ramp.depth(step) for step in (100, 150, 200)] == [0, 1 - 0.5**3, 1]
    assert Softening.of(plan, Phase("p", 100, 200, (0,), soften="hold")).depth(150) == 1
    assert Softening.of(plan, Phase("p", 100, 200, (0,))).pools == ()


def plain_st3(run: Path, num_steps: int, ramp_steps: int) -> dict[str, Tensor]:
    """The training of a run in plain torch: gradients at the softened weights, steps of the dense ones."""
    model, kept = classify.model(), summary(run)["per_weight"]
    planned = {fqn: p for fqn, p in model.named_parameters() if fqn in kept}
    optimizer = classify.optimizer(list(model.parameters()))

    def seen(step: int) -> dict[str, Tensor]:
        depth = 1 - max(0.0, 1 - step / ramp_steps) ** 3
        target = {fqn: 1 - kept[fqn]["kept"] / kept[fqn]["numel"] for fqn in planned}
        numbers = {fqn: p.numel() - round(p.numel() * depth * 0.8) for fqn, p in planned.items()}
        assert all(abs(target[fqn] - 0.8) < 0.01 for fqn in planned)
        return {fqn: soft_threshold([p.detach()], numbers[fqn])[0] for fqn, p in planned.items()}

    for step, batches in enumerate(FEED[0].steps(0, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * warmup_cosine(step, num_steps)
        dense = {fqn: p.data for fqn, p in planned.items()}
        for fqn, value in seen(step).items():
            planned[fqn].data = value
        optimizer.zero_grad()
        for batch in batches:
            classify.loss(model, batch).backward()
        for fqn, value in dense.items():
            planned[fqn].data = value
        optimizer.step()
    return {fqn: p.detach() for fqn, p in model.named_parameters()} | seen(num_steps)


FEED: list[Feed] = []


def test_a_run_is_that_of_plain_torch_with_straight_through_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, job = [dict[str, Tensor]()], loop.train

    def watched(given: loop.Job, state: TrainState) -> TrainState:
        FEED[:] = [given.feed]
        first[0] = {fqn: value.view(state.layout[fqn].shape).clone() for fqn, value in state.weights.items()}
        return job(given, state)

    monkeypatch.setattr("gapfx.training.train", watched)
    run = train(tmp_path / "run")
    plain = classify.model()
    plain.load_state_dict(first[0])
    monkeypatch.setattr(classify, "model", lambda: plain)
    for fqn, value in plain_st3(run, num_steps=20, ramp_steps=12).items():
        torch.testing.assert_close(weights(run)[fqn], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [(), WIDE], ids=["each", "global"])
def test_it_ends_at_its_sparsity(flags: tuple[object, ...], tmp_path: Path) -> None:
    facts = summary(train(tmp_path / "run", *flags))
    assert facts["sparsity_actual"] == pytest.approx(0.8, abs=1e-3)
    kept = {fqn: weight["kept"] for fqn, weight in facts["per_weight"].items()}
    assert {fqn: int(weights(tmp_path / "run")[fqn].count_nonzero()) for fqn in kept} == kept


@pytest.mark.parametrize("flags", [("--zero", 0), ("--form", "masked"), ("--zero", 2)])
def test_stage_and_form_change_no_bit(flags: tuple[object, ...], tmp_path: Path) -> None:
    assert_same_bits(train(tmp_path / "one"), train(tmp_path / "other", *flags))


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run = train(tmp_path / "whole")
    told, job = [0], loop.train

    def asked() -> bool:
        told[0] += 1
        return told[0] == 7

    def stopped(given: loop.Job, state: TrainState) -> TrainState:
        return job(dataclasses.replace(given, should_stop=asked), state)

    with monkeypatch.context() as patch:
        patch.setattr("gapfx.training.train", stopped)
        assert gapfx("sparsify", TASK, "--out", tmp_path / "cut", *FLAGS) == 130
    assert_same_bits(whole_run, train(tmp_path / "cut", "--resume"))


@pytest.mark.distributed
def test_two_ranks_soften_as_one_does(tmp_path: Path) -> None:
    one = train(tmp_path / "one", "--micro-batch", 16, *WIDE)
    more = ("--nproc", 2, "--micro-batch", 16, *WIDE)
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "two", *FLAGS, *more)
    assert code == 0, err
    for fqn, value in weights(one).items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[fqn], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--zero", 3), "a soft threshold takes whole weights"),
        (("--pattern", "2:4"), "which a soft threshold does not"),
    ],
)
def test_what_it_cannot_have_is_refused(
    flags: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *FLAGS, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
