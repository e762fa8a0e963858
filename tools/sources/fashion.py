"""Fashion-MNIST, from the Debian package that carries it."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gapfx.errors import UserError
from tools.sources.packages import DATA, Out, Subset, fetch_deb, pack, read_member, tar_of_deb, write

LICENCE = "Fashion-MNIST: MIT licence, copyright 2017 Zalando SE"
IDX_HEADER_BYTES = {"images-idx3": 16, "labels-idx1": 8}
NUM_TRAIN_OF_SUBSET, NUM_VAL_OF_SUBSET = 1_200, 300  # of each class

Arrays = Mapping[str, NDArray[np.uint8]]


def fashion(out: Out = None, subset: Subset = False) -> None:
    """Fashion-MNIST: 60,000 + 10,000 images, 31 MB, Debian package dataset-fashion-mnist."""
    folder = out or DATA / "fashion-full"
    arrays = fashion_arrays(read_deb(fetch_deb("dataset-fashion-mnist", folder)))
    check_fashion(arrays)
    chosen = first_of_each_class(arrays) if subset else arrays
    write(folder / "fashion.npz", pack(chosen, is_small=subset), LICENCE)


def read_deb(path: Path) -> dict[str, bytes]:
    """Name -> content of the gzipped IDX files in a Debian package."""
    with tarfile.open(fileobj=BytesIO(tar_of_deb(path))) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith("-ubyte.gz")]
        return {Path(member.name).name: gzip.decompress(read_member(archive, member)) for member in members}


def fashion_arrays(files: Mapping[str, bytes]) -> Arrays:
    """The four arrays of fashion.npz from the files of the package."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    for split, source in (("train", "train"), ("val", "t10k")):
        for part, kind in (("images", "images-idx3"), ("labels", "labels-idx1")):
            content = files.get(f"{source}-{kind}-ubyte.gz")
            if content is None:
                raise UserError(f"the package dataset-fashion-mnist holds no {source}-{kind}-ubyte.gz")
            values = np.frombuffer(content, np.uint8, offset=IDX_HEADER_BYTES[kind])
            arrays[f"{split}_{part}"] = values.reshape(-1, 28, 28) if part == "images" else values
    return arrays


def check_fashion(arrays: Arrays) -> None:
    """Raise UserError unless there are 60,000 and 10,000 images in ten equal classes."""
    for split, num_images in (("train", 60_000), ("val", 10_000)):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        counts = np.bincount(labels, minlength=10).tolist()
        if len(images) != num_images or counts != [num_images // 10] * 10:
            raise UserError(
                f"expected {num_images} {split} images in ten equal classes, got {len(images)} in classes of {counts}",
                fix="delete the downloads folder and run this again",
            )


def first_of_each_class(arrays: Arrays) -> Arrays:
    """The subset of the repository: the first images of each class, in the order of the whole set."""
    chosen: dict[str, NDArray[np.uint8]] = {}
    for split, count in (("train", NUM_TRAIN_OF_SUBSET), ("val", NUM_VAL_OF_SUBSET)):
        labels = arrays[f"{split}_labels"]
        kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        chosen |= {f"{split}_{part}": arrays[f"{split}_{part}"][kept] for part in ("images", "labels")}
    return chosen
