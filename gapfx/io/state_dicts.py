"""State dicts as sparse files: `gapfx.save_sparse` and `gapfx.load_sparse`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gapfx.errors import UserError
from gapfx.io.dense_files import InMemory
from gapfx.io.sparse_file import open_sparse
from gapfx.io.write_sparse import write_sparse
from gapfx.masks import pack, unpack
from gapfx.plan import Plan


def save_sparse(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    plan: Plan | None = None,
    masks: Mapping[str, Tensor] | None = None,
    compress: bool = False,
) -> None:
    """Write a state_dict to a sparse file; what is there is replaced.

    Weights of the plan are sparse, and those with bool `masks` (by key, of the weight's shape, True = kept), under
    these, else where they are not 0; other floating tensors where that is smaller. `compress` makes the values smaller
    too (needs zstandard). Raises UserError for a mask that fits no tensor.
    """
    for key, mask in (masks or {}).items():
        if key not in tensors or tensors[key].shape != mask.shape or mask.dtype != torch.bool:
            raise UserError(
                f"the mask of {key!r} is {mask.dtype} of shape {list(mask.shape)}, which fits no tensor",
                fix="give bool masks, each of the shape of the tensor with its key",
            )
    packed = {key: pack(mask) for key, mask in (masks or {}).items()}
    write_sparse(Path(path), InMemory(tensors), plan=plan, masks=packed, is_compressed=compress)


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a sparse file, dense with zeros in place. Raises FileError for a damaged file."""
    with open_sparse(path) as file:
        return {key: file.tensor(key) for key in file.keys()}  # noqa: SIM118


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Bool masks of the sparse weights in a sparse file, True = kept, by key. Raises FileError for a damaged file."""
    with open_sparse(path) as file:
        found = {key: file.weight(key) for key in file.keys()}  # noqa: SIM118
        return {key: unpack(file.bits(key), weight.shape) for key, weight in found.items() if weight}
