"""CSR and 2:4: the same weight in another form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gapfx
from gapfx.errors import UserError
from gapfx.io.forms import TwoOfFour, csr_of
from gapfx.io.sparse_file import open_sparse
from gapfx.pattern import parse_pattern


@pytest.mark.parametrize("shape", [(8, 12), (6, 3, 2, 2)])
def test_csr_is_the_weight_with_its_outputs_as_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    mask = torch.rand(shape) < 0.2
    weight = torch.randn(shape) * mask
    gapfx.save_sparse({"w": weight}, tmp_path / "x", masks={"w": mask})
    with open_sparse(tmp_path / "x") as file:
        csr = csr_of(file, "w")
    assert csr.layout == torch.sparse_csr
    assert torch.equal(csr.to_dense(), weight.flatten(1))
    assert csr.values().numel() == int(mask.sum())


@given(st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16]))
def test_two_of_four_comes_back(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(6, 16, generator=generator)
    is_live = parse_pattern("2:4").mask(dense.abs(), 0.5) & (torch.rand(6, 16, generator=generator) < 0.8)
    dense = (dense * is_live).to(dtype)
    packed = TwoOfFour.of(dense)
    assert packed.values.shape == (6, 8)
    assert packed.places.shape == (6, 2)
    assert torch.equal(packed.dense(), dense)


@pytest.mark.parametrize(("shape", "message"), [((4, 16), "more than two of four"), ((4, 12), "not a multiple of 8")])
def test_a_weight_of_no_such_pattern_is_refused(shape: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoOfFour.of(torch.ones(shape))


def test_a_state_dict_and_its_masks_come_back(tmp_path: Path) -> None:
    mask = torch.rand(20, 30) < 0.1
    state = {"w": torch.randn(20, 30) * mask, "b": torch.randn(20)}
    gapfx.save_sparse(state, tmp_path / "x", masks={"w": mask})
    back = gapfx.load_sparse(tmp_path / "x")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    masks = gapfx.load_masks(tmp_path / "x")
    assert masks.keys() == {"w"}
    assert torch.equal(masks["w"], mask)


@pytest.mark.parametrize("masks", [{"v": torch.ones(2, 2).bool()}, {"w": torch.ones(3, 2).bool()}])
def test_a_mask_that_fits_no_tensor_is_refused(masks: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the mask of '[vw]' is torch\.bool of shape .* which fits no tensor"):
        gapfx.save_sparse({"w": torch.ones(2, 2)}, tmp_path / "x.gapfx", masks=masks)
    assert not (tmp_path / "x.gapfx").exists()
