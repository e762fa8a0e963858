"""The sparse file `model.gapfx`: live values and coded masks in the container of safetensors.

The container holds every tensor of a model under its own key. Of a sparse weight these are the live values in flat
order, and beside them `KEY:mask`, a bit a weight or, where that is smaller, the gaps between live weights
(gapfx.io.mask_code). The metadata has an entry `gapfx`, JSON of an Index, with its SHA-256 beside it. Nothing in a file
is executed, and nothing is allocated by a number of the file before it was held against the number of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gapfx.errors import FileError, PlanError
from gapfx.io import mask_code, value_code
from gapfx.io.container import DTYPES, TYPES, digest
from gapfx.masks import count_kept, num_bytes
from gapfx.ops.expand import dense_of
from gapfx.plan import Plan
from gapfx.typed_json import parse

FORMAT_VERSION = 1
ENTRY, CHECK = "gapfx", "gapfx_sha256"
# Weights of a tensor for each byte that the file holds of it: more are taken for an attack.
MOST_WEIGHTS_PER_BYTE = 4096


@dataclass(frozen=True)
class StoredWeight:
    """How a sparse weight is held: `live` values of the dtype, raw or as compressed `planes` of so many bytes each.

    The mask is `bits`, or `gaps` with `low_bits` and a unary part of `unary_bytes`. `aliases` are keys of the same
    weight.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    live: int
    pattern: str = "unstructured"
    mask: Literal["bits", "gaps"] = "bits"
    low_bits: int = 0
    unary_bytes: int = 0
    planes: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Hash:
    """SHA-256 of one tensor of the container, see gapfx.io.container.digest."""

    key: str
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a file says of itself. `plan` is the JSON of the plan, or empty."""

    version: int
    gapfx: str
    torch: str
    plan: str
    weights: tuple[StoredWeight, ...]
    hashes: tuple[Hash, ...]


def text_digest(text: str) -> str:
    """SHA-256 of the index, which stands beside it."""
    return hashlib.sha256(text.encode()).hexdigest()


def mask_key(key: str) -> str:
    """Under which key the mask of a weight is."""
    return f"{key}:mask"


class SparseFile:
    """A file that is read tensor by tensor; use it in a `with`. Every mistake in it is a FileError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise FileError(f"the file cannot be read: {error}", where=str(path), fix=_RESTORE) from error
        try:
            self.index = self._read_index()
            self._check_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._file.__exit__(None, None, None)

    @property
    def plan(self) -> Plan | None:
        """The plan that the model was trained by. Raises FileError for one that is none."""
        if not self.index.plan:
            return None
        try:
            return Plan.from_json(self.index.plan, source="its plan")
        except PlanError as error:
            raise self._error(f"{error.what}") from error

    def keys(self) -> Iterator[str]:
        """Keys of the model's tensors, aliases among them."""
        for key in self._stored:
            if not key.endswith(":mask") or key.removesuffix(":mask") not in self._weights:
                yield key
        for weight in self.index.weights:
            yield from weight.aliases

    def weight(self, key: str) -> StoredWeight | None:
        """How a sparse weight is held; None for a dense tensor."""
        return self._weights.get(key)

    def like(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor of the model."""
        weight = self._weights.get(key)
        if weight is not None:
            return DTYPES[weight.dtype], weight.shape
        part = self._file.get_slice(key)
        if part.get_dtype() not in DTYPES:
            raise self._error(f"{key} has the type {part.get_dtype()}, which is not known here")
        return DTYPES[part.get_dtype()], tuple(part.get_shape())

    def values(self, key: str) -> Tensor:
        """Live values of a sparse weight in flat order."""
        weight = self._weights[key]
        stored = self._checked(weight.key)
        if not weight.planes:
            return stored
        ends = np.cumsum(weight.planes)[:-1]
        try:
            return value_code.decode(list(np.split(stored.numpy(), ends)), weight.live, DTYPES[weight.dtype])
        except ValueError as error:
            raise self._error(f"{key}: {error}") from error

    def bits(self, key: str) -> Tensor:
        """Packed mask of a sparse weight, see gapfx.masks."""
        weight = self._weights[key]
        stored = self._checked(mask_key(weight.key))
        if weight.mask == "bits":
            spare = -weight.numel % 8
            is_clean = not spare or not int(stored[-1]) >> (8 - spare)
            if count_kept(stored) != weight.live or not is_clean:
                raise self._error(f"the mask of {key} has not the {weight.live} live weights that it should have")
            return stored
        unary, low = np.split(stored.numpy(), [weight.unary_bytes])
        try:
            return mask_code.decode(mask_code.Gaps(unary, low, weight.low_bits), weight.live, weight.numel)
        except ValueError as error:
            raise self._error(f"{key}: {error}") from error

    def tensor(self, key: str) -> Tensor:
        """A tensor of the model, dense with zeros in place."""
        weight = self._weights.get(key)
        if weight is None:
            return self._checked(key)
        return dense_of(self.values(key).view(-1, 1), self.bits(key), weight.shape)

    def _read_index(self) -> Index:
        metadata = self._file.metadata() or {}
        text = metadata.get(ENTRY)
        if text is None:
            raise self._error("the file is no sparse file: it has no index")
        if text_digest(text) != metadata.get(CHECK):
            raise self._error("its index is damaged: it has not its own SHA-256")
        try:
            found: Index = parse(Index, json.loads(text), "its index")
        except (ValueError, RecursionError) as error:
            raise self._error(f"its index is not JSON: {error}") from error
        except PlanError as error:
            raise self._error(f"its index is damaged: {error.what}") from error
        if found.version != FORMAT_VERSION:
            raise FileError(
                f"the file has format {found.version}, this gapfx reads {FORMAT_VERSION}",
                where=str(self.path),
                fix="write it anew with this gapfx, or read it with the one that wrote it",
            )
        return found

    def _check_index(self) -> None:
        self._stored = set(self._file.keys())
        self._hashes = {each.key: each.sha256 for each in self.index.hashes}
        self._weights = {key: weight for weight in self.index.weights for key in (weight.key, *weight.aliases)}
        if len(self._weights) != sum(1 + len(weight.aliases) for weight in self.index.weights):
            raise self._error("a weight is twice in its index")
        if self._hashes.keys() != self._stored:
            raise self._error("its hashes are not those of its tensors")
        for weight in self.index.weights:
            self._check_weight(weight)

    def _check_weight(self, weight: StoredWeight) -> None:
        keys = (weight.key, mask_key(weight.key))
        if not self._stored.issuperset(keys) or self._stored.intersection(weight.aliases):
            raise self._error(f"its index does not fit its tensors at {weight.key}")
        if weight.dtype not in ("F64", "F32", "F16", "BF16") or any(size < 0 for size in weight.shape):
            raise self._error(f"{weight.key} would be {weight.dtype} of shape {list(weight.shape)}")
        values, mask = (self._file.get_slice(key) for key in keys)
        (value_shape, value_type), (mask_shape, mask_type) = ((s.get_shape(), s.get_dtype()) for s in (values, mask))
        wanted = ([sum(weight.planes)], "U8") if weight.planes else ([weight.live], weight.dtype)
        has_planes = len(weight.planes) in (0, DTYPES[weight.dtype].itemsize) and min(weight.planes, default=0) >= 0
        num_mask = num_bytes(weight.numel) if weight.mask == "bits" else mask_shape[0] if len(mask_shape) == 1 else -1
        is_right = (value_shape, value_type) == wanted and (mask_shape, mask_type) == ([num_mask], "U8")
        if not (is_right and has_planes and 0 <= weight.live <= weight.numel and 0 <= weight.unary_bytes <= num_mask):
            raise self._error(f"the tensors of {weight.key} are not as its index says")
        held = math.prod(value_shape) * DTYPES[value_type].itemsize + num_mask
        if max(weight.numel, 8 * weight.live) > MOST_WEIGHTS_PER_BYTE * (held + 1):
            raise self._error(f"{weight.key} would have {weight.numel:,} weights, of which it holds {held:,} bytes")

    def _checked(self, key: str) -> Tensor:
        """A tensor of the container whose bytes are those that were written."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise self._error(f"{key} cannot be read: {error}") from error
        if tensor.dtype not in TYPES or digest(tensor) != self._hashes[key]:
            raise self._error(f"{key} is damaged: it has not the SHA-256 that its index tells")
        return tensor

    def _error(self, what: str) -> FileError:
        return FileError(what, where=str(self.path), fix=_RESTORE)


_RESTORE = "restore the file from where it came, or write it again"


def open_sparse(path: str | Path) -> SparseFile:
    """Open a sparse file. Raises FileError for one that is none, or damaged."""
    return SparseFile(Path(path))
