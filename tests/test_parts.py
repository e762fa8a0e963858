"""Part segmentation: its data, its metric, how PointNet++ looks at points, and the tool that fetches more shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gapfx.cli import main
from gapfx.errors import UserError
from tests.runs import ROOT
from tests.test_examples_data import load
from tools.sources.parts import (
    Shape,
    category_of,
    check_parts,
    choose,
    collect,
    evenly,
    is_validation,
    read_triangles,
    sample,
    series_of,
)

SUBSET = ROOT / "examples" / "data" / "parts"
BOX = """#VRML V2.0 utf8
Shape { geometry IndexedFaceSet { coordIndex [0,1,2,-1,1,3,2,-1]
coord Coordinate { point [0 0 0,2 0 0,0 2 0,2 2 0] }}
appearance Appearance{material USE IC-BODY-EPOXY-04 }}
Shape { geometry IndexedFaceSet { coordIndex [0,1,2,-1]
coord Coordinate { point [0 0 1,2 0 1,0 2 1] }}
appearance Appearance{material USE PIN-01 }}
Shape { geometry IndexedFaceSet { coordIndex [0,1,2,-1]
coord Coordinate { point [0 0 9,2 0 9,0 2 9] }}
appearance Appearance{material USE IC-LABEL-01 }}
"""


@pytest.fixture(autouse=True)
def _subset_only(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("PARTS_FILE", str(SUBSET / "parts.npz"))
    monkeypatch.delenv("SHAPENET_PART_DIR", raising=False)


@pytest.fixture(scope="module")
def parts() -> Any:
    return load("examples/parts.py")


def shapenet(folder: Path, category: str = "Mug", row: str = "{x} 0.5 0 0 0 1 36.000000") -> Path:
    """A folder of ShapeNetPart with one shape in each split."""
    (folder / "train_test_split").mkdir(parents=True)
    (folder / "03797390").mkdir()
    (folder / "synsetoffset2category.txt").write_text(f"{category}\t03797390\n")
    for split in ("train", "val", "test"):
        listed = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
        listed.write_text(json.dumps([f"shape_data/03797390/{split}1"]))
        rows = "\n".join(row.format(x=x) for x in range(5))
        (folder / "03797390" / f"{split}1.txt").write_text(rows + "\n")
    return folder


def shapes(library: str, count: int = 40) -> list[Shape]:
    """Shapes of many series of one library, of two parts."""
    names = [f"m/{library}.3dshapes/{chr(65 + i % 26)}{chr(65 + i // 26)}_{i}.wrl" for i in range(count)]
    sampled = [sample(name, BOX.encode(), 16) for name in names]
    return [shape for shape in sampled if shape is not None]


def test_the_committed_shapes_are_small_and_in_the_parts_of_their_category() -> None:
    path = SUBSET / "parts.npz"
    assert path.stat().st_size <= 400_000
    with np.load(path) as file:
        assert file["parts_of_category"].shape == (7, 4)
        for split, count in (("train", 146), ("val", 53)):
            assert file[f"{split}_positions"].shape == (count, 3, 512)
            assert file[f"{split}_positions"].dtype == np.int16
            radii = np.linalg.norm(file[f"{split}_positions"] / 1024, axis=1).max(1)
            np.testing.assert_allclose(radii, 1, atol=2e-3)
            allowed = file["parts_of_category"][file[f"{split}_categories"]]
            assert np.take_along_axis(allowed, file[f"{split}_parts"].astype(int), 1).all()


def test_no_series_of_the_committed_shapes_is_in_both_splits() -> None:
    with np.load(SUBSET / "parts.npz") as file:
        train, val = ({series_of(f"{name}.wrl") for name in file[f"{split}_names"]} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val


def test_the_folder_says_where_its_shapes_come_from_and_their_licence() -> None:
    note = (SUBSET / "README.md").read_text()
    assert "CC BY-SA 4.0" in note
    assert "waives article 3" in note
    assert "kicad-packages3d" in note


def test_the_iou_of_hand_made_shapes_is_known(parts: Any) -> None:
    both = torch.tensor([True, True, False])
    truth = torch.tensor([0, 0, 1, 1])
    assert parts.shape_iou(truth, truth, both) == 1
    assert parts.shape_iou(torch.tensor([0, 0, 0, 1]), truth, both) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert parts.shape_iou(torch.tensor([0, 0, 0, 0]), truth, both) == pytest.approx((1 / 2 + 0) / 2)


def test_a_part_that_neither_has_counts_one(parts: Any) -> None:
    truth = torch.zeros(4, dtype=torch.long)
    assert parts.shape_iou(truth, truth, torch.tensor([True, True])) == 1
    assert parts.shape_iou(torch.tensor([0, 0, 0, 1]), truth, torch.tensor([True, True])) == pytest.approx(3 / 8)


def test_means_over_shapes_and_over_categories_differ_and_other_parts_never_win(parts: Any) -> None:
    allowed = torch.tensor([[True, True, False], [True, True, False], [False, True, True]])
    truth = torch.tensor([[0, 1], [0, 1], [1, 2]])
    # Part 2 has the highest score everywhere, yet is no part of category 0; there part 0 is next.
    scores = torch.tensor([3.0, 1.0, 9.0]).expand(3, 2, 3)
    batch = (torch.zeros(3, 2, 6), torch.tensor([0, 0, 1]), truth, allowed)
    metrics = parts.evaluate(lambda points, categories: scores, [batch])
    assert metrics["instance_miou"] == pytest.approx(1 / 4)
    assert metrics["class_miou"] == pytest.approx(1 / 4)
    assert metrics["accuracy"] == pytest.approx(1 / 2)
    right = (*batch[:2], torch.tensor([[0, 0], [0, 0], [1, 2]]), allowed)
    metrics = parts.evaluate(lambda points, categories: scores, [right])
    assert metrics["instance_miou"] == pytest.approx((1 + 1 + 1 / 4) / 3)
    assert metrics["class_miou"] == pytest.approx((1 + 1 / 4) / 2)


def test_farthest_points_start_at_the_first_and_spread(parts: Any) -> None:
    places = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [10, 0, 0], [4, 0, 0], [9, 0, 0]]])
    assert parts.farthest_points(places, 4).tolist() == [[0, 2, 3, 1]]


def test_a_ball_holds_the_first_points_within_its_radius_and_repeats_the_first_of_them(parts: Any) -> None:
    places = torch.tensor([[[5.0, 0, 0], [0.5, 0, 0], [0, 0, 0], [0, 0.9, 0], [0, 0, 1.1]]])
    centres = places[:, [2, 0]]
    assert parts.ball_query(places, centres, 1.0, 4).tolist() == [[[1, 2, 3, 1], [0, 0, 0, 0]]]
    assert parts.ball_query(places, centres, 1.0, 2).tolist() == [[[1, 2], [0, 0]]]


def test_interpolation_gives_known_values_at_known_places_and_means_between(parts: Any) -> None:
    known_places = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [0, 1e6, 0]]])
    known = torch.tensor([[[0.0], [4.0], [7.0]]])
    places = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    torch.testing.assert_close(
        parts.interpolate(places, known_places, known), torch.tensor([[[0.0], [2.0]]]), rtol=0, atol=1e-3
    )


def test_validation_points_are_the_same_each_time_and_training_points_are_not(parts: Any) -> None:
    val, train = parts.data("val"), parts.data("train")
    torch.testing.assert_close(val[3], val[3], rtol=0, atol=0)
    assert not torch.equal(train[3][0], train[3][0])
    assert val[3][0].shape == (parts.NUM_POINTS, 6)


def test_the_order_of_points_does_not_tell_their_parts(parts: Any) -> None:
    changes = torch.stack([(labels[1:] != labels[:-1]).sum() for _, _, labels, _ in parts.data("val")])
    assert changes.float().mean() > 50


def test_a_few_steps_teach_the_model_something(parts: Any) -> None:
    torch.manual_seed(0)
    model, batch = parts.model(), next(iter(DataLoader(parts.data("train"), 16, shuffle=True)))
    optimizer = parts.optimizer(list(model.parameters()))
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        value = parts.loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_published_size_is_that_of_the_port(parts: Any) -> None:
    shapes = {name: tuple(p.shape) for name, p in parts.reference().named_parameters() if p.dim() == 2}
    assert shapes["sa1.scales.2.linears.1.weight"] == (96, 64)
    assert shapes["sa2.scales.1.linears.0.weight"] == (128, 64 + 128 + 128 + 3)
    assert shapes["sa3.linears.2.weight"] == (1024, 512)
    assert shapes["fp3.linears.0.weight"] == (256, 1024 + 512)


def test_the_plan_has_the_groups_of_the_network_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "examples" / "parts.py"), "--no-calibrate"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    groups = {row[1]: int(row[2]) for row in rows if len(row) == 7 and row[0].isdigit() and row[0] < "6"}
    assert groups == {"sa1.*": 9, "sa2.*": 6, "sa3.*": 3, "fp3.*": 2, "fp2.*": 2, "fp1.*|head.*|classifier.*": 4}


def test_shapenet_part_is_read_from_its_own_layout(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAPENET_PART_DIR", str(shapenet(tmp_path)))
    points, category, labels, allowed = parts.data("val")[0]
    assert points.shape == (parts.NUM_POINTS, 6)
    assert sorted(points[:, 0].unique().tolist()) == [-1, -0.5, 0, 0.5, 1]
    assert category == list(parts.SHAPENET_PARTS).index("Mug")
    assert labels.unique().tolist() == [36]
    assert allowed.nonzero().flatten().tolist() == [36, 37]
    assert parts.shapenet_parts().shape == (16, 50)
    assert parts.num_categories_and_parts() == (16, 50)
    assert len(parts.data("test")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "Teapot"}, "not a category of ShapeNetPart: Teapot"),
        ({"row": "{x} 0 0 0 0 1"}, "expected rows of x y z, normal x y z, part"),
        ({"row": "{x} 0 0 0 0 1 12"}, "a part that Mug does not have"),
    ],
)
def test_a_wrong_shapenet_part_is_refused(
    arguments: dict[str, str], message: str, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAPENET_PART_DIR", str(shapenet(tmp_path / "data", **arguments)))
    with pytest.raises(UserError, match=message):
        parts.data("train")[0]


def test_a_folder_that_is_not_shapenet_part_is_refused(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAPENET_PART_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no synsetoffset2category\.txt"):
        parts.data("train")


def test_a_broken_file_of_parts_is_refused(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts.npz").write_bytes(b"half a file")
    monkeypatch.setenv("PARTS_FILE", str(tmp_path / "parts.npz"))
    with pytest.raises(UserError, match=r"parts\.npz cannot be used"):
        parts.data("train")


def test_triangles_have_the_part_of_their_material_and_labels_are_left_out() -> None:
    corners, numbers = read_triangles(BOX)
    assert corners.shape == (3, 3, 3)
    assert numbers.tolist() == [0, 0, 1]


def test_points_lie_on_the_surface_in_the_unit_ball_evenly_by_area() -> None:
    shape = sample("a.3dshapes/b.wrl", BOX.encode(), 3000)
    assert shape is not None
    assert np.bincount(shape.parts)[1] == pytest.approx(1000, abs=100)
    positions = shape.positions / 1024
    assert np.linalg.norm(positions, axis=0).max() == pytest.approx(1, abs=2e-3)
    assert len(np.unique(positions[2])) == 2
    assert np.unique(np.abs(shape.normals), axis=1).tolist() == [[0], [0], [127]]
    assert sample("a.3dshapes/b.wrl", b"#VRML V2.0 utf8", 16) is None


def test_a_series_is_a_name_without_its_numbers_and_pitches_are_one_category() -> None:
    names = [
        f"./x/Connector_PinHeader_{pitch}mm.3dshapes/PinHeader_1x{n}_P{pitch}mm.wrl"
        for pitch, n in ((2.54, 4), (1.0, 40))
    ]
    assert {category_of(name) for name in names} == {"Connector_PinHeader"}
    assert {series_of(name) for name in names} == {"PinHeader_#x#_P#mm"}


def test_some_of_each_series_are_chosen_evenly() -> None:
    sizes = {f"./x/LED_THT.3dshapes/LED_D{n:02}mm.wrl": 9_000 for n in range(20)}
    chosen = choose({**sizes, "./x/LED_THT.3dshapes/LED.wrl": 10, "./x/Valve.3dshapes/ECC.wrl": 9_000}, subset=True)
    assert chosen == {"./x/LED_THT.3dshapes/LED_D00mm.wrl", "./x/LED_THT.3dshapes/LED_D19mm.wrl"}
    assert evenly(list("abcdefg"), 3) == ["a", "d", "g"]


def test_whole_series_are_held_out_and_small_categories_left_out() -> None:
    arrays = collect([*shapes("LED_THT"), *shapes("Valve", 3)])
    assert arrays["category_names"].tolist() == ["LED_THT"]
    assert arrays["parts_of_category"].tolist() == [[True, True, False, False]]
    assert all(is_validation(series_of(f"{name}.wrl")) for name in arrays["val_names"])
    assert not any(is_validation(series_of(f"{name}.wrl")) for name in arrays["train_names"])
    assert len(arrays["train_names"]) + len(arrays["val_names"]) == 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collect([]), "holds no models with parts"),
        (lambda: check_parts(collect(shapes("LED_THT"))), "expected at least 1,200 shapes in 25 categories"),
    ],
)
def test_a_wrong_package_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_a_broken_download_of_parts_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "kicad-packages3d_6_all.deb").write_bytes(b"half a file")
    command = [sys.executable, str(ROOT / "tools" / "get_data.py"), "parts", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "cannot be" in result.stderr or "is not here" in result.stderr
