"""--init: a run that begins with weights of another one, or of a file, dense or sparse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gapfx as library
from gapfx.runtime import loop
from gapfx.runtime.state import TrainState, whole
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


def test_a_plan_of_other_groups_grows_from_the_weights(trained: Path, tmp_path: Path) -> None:
    flags = ("--method", "gap", "--groups", 2, "--sparsity", 0.8, "--init", trained / "model.gapfx")
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *SHORT, *flags) == 0
    assert len(summary(tmp_path / "run")["groups"]) == 2


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
