"""SNIP: masks by |w dL/dw| of the first batch, one threshold over all layers where asked, at prunes too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gapfx.masks import unpack
from gapfx.runtime import loop
from gapfx.runtime.state import TrainState
from tests.runs import TASK, finish, gapfx, summary, weights
from tests.tasks import classify

FLAGS = ("--phase-epochs", 0.25, "--rounds", 1, "--finetune-epochs", 0.25, "--sparsity", 0.8)
WHOLE = ("--method", "snip", "--groups", 1, "--allocation", "global")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the masks of a run should be by its own weights, and its masks, by FQN: `want/FQN` and `mask/FQN`."""
    found: dict[str, Tensor] = {}
    begin, job = loop.initial_state, loop.train

    def began(given: loop.Job) -> TrainState:
        model = classify.model()
        model.load_state_dict({fqn: p.detach() for fqn, p in given.module.named_parameters()})
        (batch,) = next(given.feed.steps(0, 1))
        classify.loss(model.train(), batch).backward()
        for weight in given.plan.weights():
            parameter = model.get_parameter(weight.fqn)
            assert parameter.grad is not None
            found[f"score/{weight.fqn}"] = (parameter * parameter.grad).abs().detach()
        return begin(given)

    def trained(given: loop.Job, state: TrainState) -> TrainState:
        for fqn, bits in state.bits.items():
            found[f"mask/{fqn}"] = unpack(bits, state.layout[fqn].shape)
        return job(given, state)

    monkeypatch.setattr("gapfx.training.initial_state", began)
    monkeypatch.setattr("gapfx.training.train", trained)
    return found


def test_the_masks_are_those_of_the_largest_sensitivities_of_all_layers(
    seen: dict[str, Tensor], tmp_path: Path
) -> None:
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *FLAGS, *WHOLE) == 0
    scores = {key.removeprefix("score/"): value for key, value in seen.items() if key.startswith("score/")}
    masks = {fqn: seen[f"mask/{fqn}"] for fqn in scores}
    every, is_live = (torch.cat([table[fqn].flatten() for fqn in scores]) for table in (scores, masks))
    num_live = int(is_live.sum())
    assert num_live == sum(weight["kept"] for weight in summary(tmp_path / "run")["per_weight"].values())
    lowest_live, highest_dead = float(every[is_live].min()), float(every[~is_live].max())
    assert lowest_live >= highest_dead * (1 - 1e-4)
    assert len({round(float(mask.float().mean()), 2) for mask in masks.values()}) > 2


def test_with_a_uniform_allocation_each_layer_keeps_its_own_share(seen: dict[str, Tensor], tmp_path: Path) -> None:
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *FLAGS, "--method", "snip") == 0
    for key, score in seen.items():
        if key.startswith("score/"):
            mask = seen[key.replace("score/", "mask/")]
            assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.02)
            assert float(score[mask].min()) >= float(score[~mask].max()) * (1 - 1e-4)


def test_it_prunes_by_gradients_at_the_end_of_phases_too(tmp_path: Path) -> None:
    flags = (*FLAGS, "--method", "gap", "--criterion")
    for criterion in ("snip", "magnitude"):
        assert gapfx("sparsify", TASK, "--out", tmp_path / criterion, *flags, criterion) == 0
    facts = summary(tmp_path / "snip")
    assert facts["sparsity_actual"] == pytest.approx(0.8, abs=1e-3)
    ours, theirs = weights(tmp_path / "snip"), weights(tmp_path / "magnitude")
    assert any(not torch.equal(ours[fqn] != 0, theirs[fqn] != 0) for fqn in facts["per_weight"])


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_find_the_masks_of_one(zero: int, tmp_path: Path) -> None:
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "one", *FLAGS, *WHOLE, "--micro-batch", 16)
    assert code == 0, err
    more = ("--nproc", 2, "--micro-batch", 16, "--zero", zero)
    code, _, err = finish("sparsify", TASK, "--out", tmp_path / "two", *FLAGS, *WHOLE, *more)
    assert code == 0, err
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for fqn in summary(tmp_path / "one")["per_weight"]:
        assert torch.equal(ours[fqn] != 0, theirs[fqn] != 0)
