"""Gradients of weights as if they were dense, as criteria get them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapfx.errors import Interrupted
from gapfx.runtime import loop
from gapfx.runtime.gradients import dense_gradients
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.steps import PhaseRun
from tests.runs import TASK, gapfx
from tests.tasks import classify

SCALE = 2.0**-30  # of which no rounding depends
Found = dict[str, Tensor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """Gradients at the start of a run that stops there: the runtime's, those of a small loss, those of torch, those
    with a frozen stem."""
    found: list[Found] = []

    def watched(run: PhaseRun, state: TrainState, groups: Iterable[int]) -> Found:
        def small(model: nn.Module, batch: Any) -> Tensor:
            return run.job.loss(model, batch) * SCALE

        before = {fqn: value.clone() for fqn, value in state.weights.items()}
        found.append(dense_gradients(run, state, groups))
        found.append(dense_gradients(replace(run, job=replace(run.job, loss=small)), state, groups))
        assert all(torch.equal(state.weights[fqn], value) for fqn, value in before.items())
        found.append(plain_gradients(run, state))
        skeleton = copy.deepcopy(run.skeleton)
        skeleton.get_parameter("stem.weight").requires_grad_(False)
        found.append(dense_gradients(replace(run, skeleton=skeleton), state, groups))
        raise Interrupted("enough")

    monkeypatch.setattr(loop, "dense_gradients", watched)
    return found


def plain_gradients(run: PhaseRun, state: TrainState) -> Found:
    model = classify.model()
    model.load_state_dict({fqn: whole(state, state.weights, fqn) for fqn in state.weights})
    (batch,) = next(run.job.feed.steps(state.step, state.step + 1))
    classify.loss(model.train(), batch).backward()
    return {fqn: p.grad.flatten() for fqn, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("zero", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_they_are_those_of_torch_and_keep_every_bit_however_small_the_loss(
    zero: int, dtype: str, tmp_path: Path, seen: list[Found]
) -> None:
    flags = ("--method", "snip", "--zero", zero, "--dtype", dtype)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *flags) == 130
    ours, small, plain, frozen = seen
    assert len(ours) == 8
    for fqn, gradient in ours.items():
        assert gradient.any()
        assert torch.equal(small[fqn] / SCALE, gradient)
        off = (gradient - plain[fqn]).abs().max() / plain[fqn].abs().max()
        assert off <= (1e-5 if dtype == "fp32" else 0.05), fqn
        assert bool(frozen[fqn].any()) == (fqn != "stem.weight")
