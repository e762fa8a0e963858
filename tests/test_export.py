"""`gapfx export`: forms come back as the same model, and what cannot be had is one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gapfx
from gapfx.io.forms import TwoOfFour
from tests import runs
from tests.runs import ROOT, TASK, weights

SHORT = ("--rounds", 1, "--phase-epochs", 0.25, "--finetune-epochs", 0.25)
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    assert runs.gapfx("sparsify", TASK, "--out", out, *SHORT, "--pattern", "2:4") == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Exit code, output and errors of `gapfx export`."""

    def command(*flags: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = runs.gapfx("export", *flags)
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def test_a_sparse_file_of_a_run_is_written_anew_and_back_to_dense(run: Path, say: Say) -> None:
    code, out, _ = say(run, "--to", "gapfx", "--out", run / "again.gapfx")
    assert code == 0
    assert "8 sparse weights" in out
    code, out, _ = say(run / "again.gapfx", "--to", "safetensors")
    assert (code, "zeros in place" in out) == (0, True)
    back = load_file(run / "again.safetensors")
    assert back.keys() == weights(run).keys()
    assert all(torch.equal(back[key], value) for key, value in weights(run).items())


def test_a_dense_file_of_anybody_becomes_sparse(tmp_path: Path, say: Say) -> None:
    weight = torch.randn(300, 300) * (torch.rand(300, 300) < 0.1)
    save_file({"w": weight}, tmp_path / "theirs.safetensors")
    code, out, _ = say(tmp_path / "theirs.safetensors", "--to", "gapfx")
    assert (code, "8." in out) == (0, True)
    assert torch.equal(gapfx.load_sparse(tmp_path / "theirs.gapfx")["w"], weight)


def test_safetensors_in_pieces_have_an_index(run: Path, say: Say) -> None:
    assert say(run, "--to", "safetensors", "--shard-mib", 1)[0] == 0
    places = json.loads((run / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == weights(run).keys()


def test_csr_and_two_of_four_are_read_by_torch_without_code(run: Path, say: Say) -> None:
    assert say(run, "--to", "csr")[0] == say(run, "--to", "2:4")[0] == 0
    csr, packed = (torch.load(run / f"model.{name}.pt", weights_only=True) for name in ("csr", "2of4"))
    planned = json.loads((run / "summary.json").read_text())["per_weight"]
    for fqn, value in weights(run).items():
        if fqn in planned:
            assert torch.equal(csr[fqn].to_dense(), value)
            assert torch.equal(TwoOfFour(**packed[fqn]).dense(), value)
        else:
            assert torch.equal(csr[fqn], value)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--sparse",)], ids=["dense", "sparse"])
def test_onnx_runtime_computes_the_same(flags: tuple[str, ...], run: Path, say: Say) -> None:
    code, out, _ = say(run, "--to", "onnx", *flags)
    assert (code, "in ONNX Runtime its outputs differ by at most" in out) == (0, True)


@pytest.mark.slow
def test_a_program_computes_the_same(run: Path, say: Say) -> None:
    code, out, _ = say(run, "--to", "program")
    assert (code, "read back its outputs differ by at most" in out) == (0, True)


@pytest.mark.slow
def test_sparse_initialisers_make_an_onnx_file_smaller(tmp_path: Path, say: Say) -> None:
    flags = ("--phase-epochs", 0.01, "--finetune-epochs", 0.01, "--sparsity", 0.95)
    assert runs.gapfx("sparsify", ROOT / "examples" / "text.py", "--out", tmp_path / "run", *flags) == 0
    for name, extra in (("dense", ()), ("sparse", ("--sparse",))):
        assert say(tmp_path / "run", "--to", "onnx", "--out", tmp_path / name, *extra)[0] == 0
    assert (tmp_path / "sparse").stat().st_size < 0.6 * (tmp_path / "dense").stat().st_size


def test_what_cannot_be_exported_is_one_message(run: Path, tmp_path: Path, say: Say) -> None:
    dense = tmp_path / "dense.safetensors"
    save_file({"w": torch.ones(64, 64)}, dense)
    (run / "taken").touch()
    for flags, message in (
        ((run, "--to", "gguf"), "there is no form 'gguf'"),
        ((run, "--to", "safetensors"), "model.safetensors exists"),
        ((run, "--to", "csr", "--out", run / "away" / "x"), "does not exist"),
        ((tmp_path / "none", "--to", "gapfx"), "does not exist"),
        ((dense, "--to", "csr"), "has no sparse weights"),
        ((run / "model.gapfx", "--to", "onnx"), "a sparse file does not say how its model is built"),
        ((run / "config.json", "--to", "gapfx", "--out", run / "x"), "it cannot be read"),
    ):
        code, _, err = say(*flags)
        assert (code, message in err) == (2, True), (flags, err)


def test_an_unstructured_weight_is_no_two_of_four(tmp_path: Path, say: Say) -> None:
    mask = torch.zeros(8, 16)
    mask[:, :4] = 1
    gapfx.save_sparse({"w": torch.randn(8, 16) * mask}, tmp_path / "x.gapfx", masks={"w": mask.bool()})
    code, _, err = say(tmp_path / "x.gapfx", "--to", "2:4")
    assert (code, "w: more than two of four weights are not 0" in err) == (2, True)


def test_only_force_replaces_a_file(run: Path, say: Say) -> None:
    before = (run / "model.gapfx").read_bytes()
    assert say(run, "--to", "gapfx")[0] == 2
    assert (run / "model.gapfx").read_bytes() == before
    assert say(run, "--to", "gapfx", "--force", "--compress")[0] == 0
    assert (run / "model.gapfx").read_bytes() != before
    assert all(torch.equal(gapfx.load_sparse(run / "model.gapfx")[key], value) for key, value in weights(run).items())
