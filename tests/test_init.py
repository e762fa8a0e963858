"""--init: a run that begins with weights of another one, or of a file, dense or sparse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gapfx as library
from gapfx.errors import UserError
from gapfx.origin import fill_from
from gapfx.runtime import loop
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.steps import PhaseRun
from tests.runs import TASK, gapfx, summary, weights

SHORT = ("--rounds", 1, "--phase-epochs", 0.25, "--finetune-epochs", 0.25)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("init") / "run"
    assert gapfx("sparsify", TASK, "--out", out, *SHORT, "--method", "gmp", "--sparsity", 0.8) == 0
    return out


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights that a run in this process begins to train with, zeros in place."""
    found: dict[str, Tensor] = {}
    train = loop.train

    def watched(job: loop.Job, state: TrainState) -> TrainState:
        found.update({fqn: whole(state, state.weights, fqn).clone() for fqn in state.weights})
        return train(job, state)

    monkeypatch.setattr("gapfx.training.train", watched)
    return found


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights that each phase of a run in this process grows, as its training finds them."""
    found: list[dict[str, Tensor]] = []
    train_phase = loop.train_phase

    def watched(run: PhaseRun, state: TrainState) -> frozenset[str]:
        found.append({fqn: whole(state, state.weights, fqn).clone() for fqn in run.grown})
        return train_phase(run, state)

    monkeypatch.setattr(loop, "train_phase", watched)
    return found


def dense_weights(trained: Path) -> dict[str, Tensor]:
    """Those of a run with other numbers, none of them 0, where it has zeros."""
    found, draw = weights(trained), torch.Generator().manual_seed(0)
    return {fqn: v.where(v != 0, torch.rand(v.shape, generator=draw).mul(1e-3).add(1e-6)) for fqn, v in found.items()}


def sources(trained: Path, folder: Path) -> list[Path]:
    """The same weights as a run, a sparse file and a dense file."""
    save_file(weights(trained), folder / "dense.safetensors")
    return [trained, trained / "model.gapfx", folder / "dense.safetensors"]


def test_a_sparse_model_goes_on_under_its_own_masks(trained: Path, tmp_path: Path, began: dict[str, Tensor]) -> None:
    for number, source in enumerate(sources(trained, tmp_path)):
        flags = ("--method", "static", "--sparsity", 0.8, "--init", source)
        assert gapfx("sparsify", TASK, "--out", tmp_path / str(number), *SHORT, *flags) == 0
        assert all(torch.equal(began[fqn], value) for fqn, value in weights(trained).items())


def test_another_sparsity_keeps_the_largest_weights(trained: Path, tmp_path: Path, began: dict[str, Tensor]) -> None:
    flags = ("--method", "static", "--sparsity", 0.9, "--init", trained)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    before = weights(trained)
    for fqn, facts in summary(tmp_path / "run")["per_weight"].items():
        live = began[fqn] != 0
        assert int(live.sum()) <= facts["kept"] < 0.11 * facts["numel"]
        assert torch.equal(began[fqn][live], before[fqn][live])
        assert before[fqn][live].abs().min() >= before[fqn][~live].abs().max()


def test_weights_under_a_plan_with_phases_are_masked_by_what_they_are_worth(
    trained: Path, tmp_path: Path, began: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gapfx("plan", TASK, *SHORT, "--method", "static", "--sparsity", 0.9, "--json") == 0
    plan = tmp_path / "plan.json"
    plan.write_text(capsys.readouterr().out)
    assert '"start_masks": "random"' in plan.read_text()
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--plan", plan, "--init", trained) == 0
    before = weights(trained)
    for fqn in summary(tmp_path / "run")["per_weight"]:
        live = began[fqn] != 0
        assert before[fqn][live].abs().min() >= before[fqn][~live].abs().max()


def test_a_plan_of_other_groups_grows_from_the_weights(trained: Path, tmp_path: Path) -> None:
    flags = ("--method", "gap", "--groups", 2, "--sparsity", 0.8, "--init", trained / "model.gapfx")
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    assert len(summary(tmp_path / "run")["groups"]) == 2


def test_oneshot_prunes_the_weights_at_once(trained: Path, tmp_path: Path, began: dict[str, Tensor]) -> None:
    save_file(dense_weights(trained), tmp_path / "dense.safetensors")
    flags = ("--method", "oneshot", "--sparsity", 0.9, "--init", tmp_path / "dense.safetensors")
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    for fqn, facts in summary(tmp_path / "run")["per_weight"].items():
        value = dense_weights(trained)[fqn]
        least = value.abs().flatten().topk(facts["kept"]).values[-1]
        assert torch.equal(began[fqn], value.where(value.abs() >= least, 0.0))


def test_without_learning_the_weights_are_pruned_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    """The start of every curve: --lr-scale 0."""
    source = tmp_path / "dense.safetensors"
    save_file(dense_weights(trained), source)
    flags = ("--method", "oneshot", "--sparsity", 0.5, "--init", source, "--lr-scale", 0)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    planned = summary(tmp_path / "run")["per_weight"]
    for fqn, value in weights(tmp_path / "run").items():
        before = dense_weights(trained)[fqn]
        assert torch.equal(value, before.where(value != 0, 0.0) if fqn in planned else before)


@pytest.mark.parametrize(("growth", "is_back"), [("saved", True), ("zero", False)])
def test_weights_that_grow_saved_go_back_to_what_they_were_trained_to(
    growth: str, is_back: bool, trained: Path, tmp_path: Path, grown: list[dict[str, Tensor]]
) -> None:
    source = tmp_path / "dense.safetensors"
    save_file(dense_weights(trained), source)
    flags = ("--method", "gap", "--groups", 2, "--sparsity", 0.9, "--growth", growth, "--lr-scale", 0, "--init", source)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    second = grown[1]
    assert second
    for fqn, value in second.items():
        assert torch.equal(value, dense_weights(trained)[fqn]) is is_back


def test_a_buffer_that_the_module_makes_by_itself_may_be_in_the_file(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("places", torch.arange(3), persistent=False)
    held = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    save_file({**held, "places": torch.arange(3)}, tmp_path / "equal.safetensors")
    fill_from(module, tmp_path / "equal.safetensors")
    assert torch.equal(module.weight, held["weight"])
    save_file({**held, "places": torch.arange(1, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="the model has no 'places'"):
        fill_from(module, tmp_path / "other.safetensors")


def test_a_resumed_run_does_not_need_the_file_again(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.gapfx"
    library.save_sparse(weights(trained), source)
    flags = ("--method", "static", "--init", source, "--checkpoint-every", 4)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    before = weights(tmp_path / "run")
    source.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags, "--resume") == 0
    assert all(torch.equal(value, before[fqn]) for fqn, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({"w": torch.ones(2)}, "these are weights of another model: it has no"),
        ("text", "it cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_one_message(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif content:
        path.write_text(str(content))
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, "--init", path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
