"""Sparse files: every tensor comes back, they are small, and damaged or hostile ones are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from gapfx.errors import FileError
from gapfx.io.dense_files import InMemory
from gapfx.io.sparse_file import CHECK, ENTRY, open_sparse, text_digest
from gapfx.io.write_sparse import write_sparse
from gapfx.masks import pack
from gapfx.plan import Group, Plan, Weight

PLAN = Plan(
    (Group("g", (Weight("a.weight", (40, 30), 0.9, aliases=("tied.weight",)), Weight("c.weight", (16, 9), 0.5))),)
)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def sparse(*shape: int, share: float) -> Tensor:
        dense = torch.randn(*shape, generator=generator)
        return torch.where(torch.rand(*shape, generator=generator) < share, dense, 0).to(dtype)

    a = sparse(40, 30, share=0.1)
    return {
        "a.weight": a,
        "tied.weight": a,
        "b.bias": torch.randn(40, generator=generator).to(dtype),
        "c.weight": sparse(16, 9, share=0.5),
        "free": sparse(50, 7, share=0.05),
        "steps": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
    }


def read(path: Path) -> dict[str, Tensor]:
    with open_sparse(path) as file:
        return {key: file.tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.gapfx"
    write_sparse(path, InMemory(tensors()), plan=PLAN)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_every_tensor_comes_back(dtype: torch.dtype, is_compressed: bool, tmp_path: Path) -> None:
    path, wanted = tmp_path / "model.gapfx", tensors(dtype) | {"zeros": torch.zeros(20, 30, dtype=dtype)}
    write_sparse(path, InMemory(wanted), plan=PLAN, is_compressed=is_compressed)
    found = read(path)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_a_weight_that_others_share_is_held_once(written: Path) -> None:
    with open_sparse(written) as file:
        assert file.weight("tied.weight") is file.weight("a.weight")
        assert "tied.weight" in list(file.keys())
        assert file.plan == PLAN
    with safe_open(written, framework="pt") as container:
        assert "tied.weight" not in list(container.keys())


def test_live_zeros_stay_live_under_given_masks(tmp_path: Path) -> None:
    path, mask = tmp_path / "model.gapfx", torch.zeros(40, 30, dtype=torch.bool)
    mask[:, :4] = True
    values = {**tensors(), "a.weight": torch.randn(40, 30) * mask}
    values["a.weight"][0, 0] = 0
    write_sparse(path, InMemory(values), plan=PLAN, masks={"a.weight": pack(mask)})
    with open_sparse(path) as file:
        assert torch.equal(file.bits("a.weight"), pack(mask))
        assert torch.equal(file.tensor("a.weight"), values["a.weight"])


def test_unplanned_tensors_are_sparse_only_where_that_is_smaller(written: Path) -> None:
    with open_sparse(written) as file:
        assert file.weight("free") is not None
        assert file.weight("b.bias") is None
        assert file.weight("steps") is None


@pytest.mark.parametrize(
    ("sparsity", "dtype", "least"),
    [(0.8, torch.float32, 4.3), (0.8, torch.bfloat16, 3.8), (0.9, torch.float32, 8.5), (0.9, torch.bfloat16, 7.5)],
)
def test_files_are_as_small_as_they_should_be(
    sparsity: float, dtype: torch.dtype, least: float, tmp_path: Path
) -> None:
    weight = torch.randn(1000, 1000)
    weight = torch.where(torch.rand_like(weight) < sparsity, 0, weight).to(dtype)
    save_file({"w": weight}, tmp_path / "dense")
    write_sparse(tmp_path / "sparse", InMemory({"w": weight}))
    assert (tmp_path / "dense").stat().st_size / (tmp_path / "sparse").stat().st_size > least


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the file with another index, and the tensors that it had."""
    with safe_open(path, framework="pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        index = json.loads(file.metadata()[ENTRY])
    change(index)
    path.write_bytes(save(held, {ENTRY: json.dumps(index), CHECK: text_digest(json.dumps(index))}))


def first(index: dict[str, Any]) -> dict[str, Any]:
    return next(weight for weight in index["weights"] if weight["key"] == "a.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=2), "the file has format 2, this gapfx reads 1"),
        (lambda index: index.pop("weights"), "the field 'weights' is missing"),
        (lambda index: first(index).update(live="many"), "expected int"),
        (lambda index: first(index).update(live=7), "the tensors of a.weight are not as its index says"),
        (lambda index: first(index).update(live=-1), "are not as its index says"),
        (lambda index: first(index).update(shape=[2**40, 2**40]), "weights, of which it holds"),
        (lambda index: first(index).update(shape=[-40, 30]), "of shape"),
        (lambda index: first(index).update(dtype="I64"), "would be I64"),
        (lambda index: first(index).update(key="b.bias"), "its index does not fit its tensors at b.bias"),
        (lambda index: first(index).update(aliases=["c.weight"]), "a weight is twice in its index"),
        (lambda index: first(index).update(planes=[10, 10]), "are not as its index says"),
        (lambda index: first(index).update(unary_bytes=10**9), "are not as its index says"),
        (lambda index: first(index).update(mask="bits"), "are not as its index says"),
        (lambda index: index["hashes"].pop(), "its hashes are not those of its tensors"),
        (lambda index: index["weights"].append(first(index)), "a weight is twice"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, written: Path
) -> None:
    changed(written, change)
    with pytest.raises(FileError, match=message):
        read(written)


def test_a_mask_of_another_number_of_weights_is_refused(written: Path) -> None:
    changed(written, lambda index: first(index).update(low_bits=first(index)["low_bits"] + 1))
    with pytest.raises(FileError, match=r"a\.weight: the low bits of"):
        read(written)


def test_a_plan_that_is_none_is_told_apart_from_the_tensors(written: Path) -> None:
    changed(written, lambda index: index.update(plan="{}"))
    assert torch.equal(read(written)["a.weight"], tensors()["a.weight"])
    with open_sparse(written) as file, pytest.raises(FileError, match="the field 'groups' is missing"):
        _ = file.plan


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, (10**12).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileError, match="the file cannot be read"):
        open_sparse(tmp_path / "x")
    save_file({"w": torch.ones(3)}, tmp_path / "dense")
    with pytest.raises(FileError, match="the file is no sparse file"):
        open_sparse(tmp_path / "dense")
    with pytest.raises(FileError, match="cannot be read"):
        open_sparse(tmp_path / "none")


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_byte_never_gives_another_tensor(data: st.DataObject, written: Path) -> None:
    content = bytearray(written.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = written.with_name("damaged")
    path.write_bytes(content)
    try:
        found = read(path)
    except FileError:
        return
    wanted = tensors()  # what was changed is no part of the model, such as the padding of the header
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def test_a_file_that_cannot_be_written_leaves_the_old_one(written: Path) -> None:
    class Broken(InMemory):
        def tensor(self, key: str) -> Tensor:
            if key == "steps":
                raise OSError("no space")
            return super().tensor(key)

    before = written.read_bytes()
    with pytest.raises(OSError, match="no space"):
        write_sparse(written, Broken(tensors()), plan=PLAN)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]
