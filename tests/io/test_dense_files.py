"""Dense safetensors, whole and in pieces with an index, to sparse files and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gapfx.errors import FileError
from gapfx.io.dense_files import INDEX, DenseFiles, InMemory, write_dense
from gapfx.io.sparse_file import open_sparse
from gapfx.io.write_sparse import write_sparse

TENSORS = {f"layer{i}.weight": torch.randn(64, 32) * (torch.rand(64, 32) > 0.9) for i in range(5)}


def test_pieces_with_an_index_are_read_as_one(tmp_path: Path) -> None:
    files = write_dense(tmp_path / "model", InMemory(TENSORS), most_bytes=20_000)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with DenseFiles(tmp_path / "model") as source:
        assert {key: source.like(key) for key in source.keys()} == dict.fromkeys(TENSORS, (torch.float32, (64, 32)))  # noqa: SIM118
        assert all(torch.equal(source.tensor(key), value) for key, value in TENSORS.items())
    places = json.loads((tmp_path / "model" / INDEX).read_text())
    assert places["metadata"]["total_size"] == 5 * 64 * 32 * 4


def test_a_sharded_checkpoint_survives_the_way_to_a_sparse_file_and_back(tmp_path: Path) -> None:
    write_dense(tmp_path / "model", InMemory(TENSORS), most_bytes=20_000)
    with DenseFiles(tmp_path / "model") as source:
        write_sparse(tmp_path / "model.gapfx", source)
    with open_sparse(tmp_path / "model.gapfx") as file:
        write_dense(tmp_path / "back.safetensors", file)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "it is no index"),
        ("[]", "it is no index"),
        ('{"weight_map": {}}', "it places no tensors"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "which is no file beside it"),
        ('{"weight_map": {"a": 3}}', "which is no file beside it"),
        ('{"weight_map": {"a": "away.safetensors"}}', "it cannot be read"),
        ('{"weight_map": {"a": "here.safetensors"}}', "here.safetensors has no a"),
    ],
)
def test_an_index_that_is_none_is_refused(index: str, message: str, tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "here.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(FileError, match=message):
        DenseFiles(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="it cannot be read"):
        DenseFiles(tmp_path)
