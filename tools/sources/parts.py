"""Electronic components as point clouds with labelled parts, from the Debian package that carries KiCad's 3D models.

A model is triangles, each with a named material: the family of the material is the part that its points belong to. A
library is a category.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapfx.errors import UserError
from tools.sources.packages import DATA, Out, Subset, fetch_deb, list_deb, pack, stream_deb, write

LICENCE = (
    "KiCad libraries: CC BY-SA 4.0 with an exception for electronic designs; in the whole set some files are GPL-3+ or "
    "GPL-2+, see the copyright file of kicad-packages3d"
)
PART_NAMES = ("body", "pin", "metal", "lens")
# By the start of the material's name, first match wins. A label is paint on the body, 0.2 % of the points: not sampled.
PART_OF_MATERIAL = {"PIN": "pin", "CONTACT": "pin", "MET": "metal", "GLASS": "lens", "LED": "lens"}
LABEL = re.compile("LABEL|MARK|WHITE-BAND")
FACES = re.compile(r"coordIndex\s*\[([^\]]*)\].*?point\s*\[([^\]]*)\].*?material USE ([\w.+-]+)", re.S)
UNIT = 1 / 1024  # of the stored positions; a shape has radius 1
NORMAL_UNIT = 1 / 127
LEAST_BYTES, MOST_BYTES = 2_000, 2_500_000  # of a model: neither empty nor a whole circuit board
MOST_OF_A_SERIES = 6
VAL_SHARE = 5  # one series in five
LEAST_TRAIN, LEAST_VAL = 5, 2  # shapes of a category
LEAST_SHAPES, LEAST_CATEGORIES = 1_200, 25
# Libraries without a file under the GPL, with several parts and forms.
LIBRARIES_OF_SUBSET = (
    "Battery",
    "Connector_PinHeader",
    "Crystal",
    "Display_7Segment",
    "LED_THT",
    "Package_TO_SOT_THT",
    "Potentiometer_THT",
)
MOST_OF_A_SERIES_IN_SUBSET = 2
NUM_POINTS, NUM_POINTS_OF_SUBSET = 2048, 512

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """Points on one model: positions int16 [3, N], normals int8 [3, N], parts uint8 [N]."""

    name: str
    positions: NDArray[np.int16]
    normals: NDArray[np.int8]
    parts: NDArray[np.uint8]


def parts(out: Out = None, subset: Subset = False) -> None:
    """KiCad components: point clouds in up to 4 parts, 20 MB; Debian package kicad-packages3d (379 MB)."""
    folder = out or DATA / "parts-full"
    package = fetch_deb("kicad-packages3d", folder)
    chosen = choose(list_deb(package), subset)
    num_points = NUM_POINTS_OF_SUBSET if subset else NUM_POINTS
    sampled = (sample(name, content, num_points) for name, content in stream_deb(package, chosen))
    arrays = collect(shape for shape in sampled if shape is not None)
    if not subset:
        check_parts(arrays)
    write(folder / "parts.npz", pack(arrays, is_small=subset), LICENCE)


def category_of(name: str) -> str:
    """Library of a model; libraries that differ in pitch or voltage hold the same forms and are one category."""
    return re.sub(r"(_[\d.]+mm|_HighVoltage)?\.3dshapes$", "", PurePosixPath(name).parent.name)


def series_of(name: str) -> str:
    """Name of a model without its numbers: what differs in the number of pins or a length alone is one series."""
    return re.sub(r"\d+([.,]\d+)*", "#", PurePosixPath(name).stem)


def is_validation(series: str) -> bool:
    """Whether a whole series is held out: near duplicates never stand on both sides."""
    return zlib.crc32(series.encode()) % VAL_SHARE == 0


def choose(sizes: Mapping[str, int], subset: bool) -> set[str]:
    """Models to sample, of name -> bytes: some of each series and category, evenly over its sorted names."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, size in sorted(sizes.items()):
        is_wanted = not subset or category_of(name) in LIBRARIES_OF_SUBSET
        if name.endswith(".wrl") and LEAST_BYTES < size < MOST_BYTES and is_wanted:
            groups[category_of(name), series_of(name)].append(name)
    most = MOST_OF_A_SERIES_IN_SUBSET if subset else MOST_OF_A_SERIES
    return {name for names in groups.values() for name in evenly(names, most)}


def evenly(names: list[str], most: int) -> list[str]:
    """At most `most` of the names, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [names[place] for place in places]


def sample(name: str, content: bytes, num_points: int) -> Shape | None:
    """Points on the triangles of a VRML file, evenly by area; None when it has less than two parts."""
    triangles, triangle_parts = read_triangles(content.decode("latin1"))
    crosses = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    areas = np.linalg.norm(crosses, axis=1)
    if not areas.sum() > 0:
        return None
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    chosen = np.sort(generator.choice(len(areas), num_points, p=areas / areas.sum()))
    chosen = chosen[np.argsort(triangle_parts[chosen], kind="stable")]  # neighbours side by side compress better
    if len(np.unique(triangle_parts[chosen])) < 2:
        return None
    points = points_inside(triangles[chosen], generator)
    points -= (points.max(0) + points.min(0)) / 2
    points /= np.linalg.norm(points, axis=1).max()
    normals = crosses[chosen] / areas[chosen, None]
    return Shape(
        name, quantise(points, UNIT, np.int16), quantise(normals, NORMAL_UNIT, np.int8), triangle_parts[chosen]
    )


def read_triangles(text: str) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Corners [T, 3, 3] and parts [T] of the triangles that are not labels; empty for a file of other polygons."""
    corners: list[NDArray[np.float64]] = [np.zeros((0, 3, 3))]
    parts: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)]
    for faces, points, material in FACES.findall(text):
        indices = np.array(faces.replace(",", " ").split(), np.int64)
        if LABEL.search(material.upper()) or len(indices) % 4 or (indices[3::4] != -1).any():
            continue
        places = np.array(points.replace(",", " ").split(), np.float64).reshape(-1, 3)
        corners.append(places[indices.reshape(-1, 4)[:, :3]])
        parts.append(np.full(len(indices) // 4, part_of(material), np.uint8))
    return np.concatenate(corners), np.concatenate(parts)


def part_of(material: str) -> int:
    """Number of the part that a material makes; what is no pin, metal or lens is body."""
    found = (part for start, part in PART_OF_MATERIAL.items() if material.upper().startswith(start))
    return PART_NAMES.index(next(found, "body"))


def points_inside(triangles: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """One point in each triangle [N, 3, 3], uniformly: [N, 3] (Osada et al., 2002, section 3.2)."""
    root, share = np.sqrt(generator.random((len(triangles), 1))), generator.random((len(triangles), 1))
    a, b, c = triangles.transpose(1, 0, 2)
    return (1 - root) * a + root * (1 - share) * b + root * share * c


def quantise(values: NDArray[np.float64], unit: float, kind: type[Any]) -> NDArray[Any]:
    """Values [N, 3] as whole multiples of the unit, [3, N]: like numbers side by side compress better."""
    return np.ascontiguousarray((values / unit).round().astype(kind).T)


def collect(shapes: Iterable[Shape]) -> Arrays:
    """The arrays of parts.npz: both splits, for each category that has enough shapes in both, and its parts."""
    split: dict[str, dict[str, list[Shape]]] = defaultdict(lambda: {"train": [], "val": []})
    for shape in sorted(shapes, key=lambda shape: shape.name):
        split[category_of(shape.name)]["val" if is_validation(series_of(shape.name)) else "train"].append(shape)
    kept = {c: s for c, s in sorted(split.items()) if len(s["train"]) >= LEAST_TRAIN and len(s["val"]) >= LEAST_VAL}
    if not kept:
        raise UserError("the package kicad-packages3d holds no models with parts in this form")
    arrays: dict[str, NDArray[Any]] = {"category_names": np.array(list(kept)), "part_names": np.array(PART_NAMES)}
    arrays["parts_of_category"] = np.stack([parts_in(s["train"] + s["val"]) for s in kept.values()])
    for name in ("train", "val"):
        pairs = [(number, shape) for number, s in enumerate(kept.values()) for shape in s[name]]
        arrays[f"{name}_categories"] = np.array([number for number, _ in pairs], np.uint8)
        arrays[f"{name}_names"] = np.array([PurePosixPath(shape.name).stem for _, shape in pairs])
        for field in ("positions", "normals", "parts"):
            arrays[f"{name}_{field}"] = np.stack([getattr(shape, field) for _, shape in pairs])
    return arrays


def parts_in(shapes: Iterable[Shape]) -> NDArray[np.bool_]:
    """Which parts occur in any of the shapes, [P]."""
    return np.isin(np.arange(len(PART_NAMES)), np.concatenate([shape.parts for shape in shapes]))


def check_parts(arrays: Arrays) -> None:
    """Raise UserError unless the number of shapes and categories is near what the package is known to give."""
    num_shapes = len(arrays["train_names"]) + len(arrays["val_names"])
    num_categories = len(arrays["category_names"])
    if num_shapes < LEAST_SHAPES or num_categories < LEAST_CATEGORIES:
        raise UserError(
            f"expected at least {LEAST_SHAPES:,} shapes in {LEAST_CATEGORIES} categories from kicad-packages3d, got "
            f"{num_shapes:,} in {num_categories}",
            fix="delete the downloads folder and run this again",
        )
