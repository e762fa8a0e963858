"""Writes sparse files: weights with masks as their live values, and whatever is smaller that way."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gapfx.io import mask_code, value_code
from gapfx.io.container import TYPES, Entry, digest, write_tensors
from gapfx.io.dense_files import Source
from gapfx.io.sparse_file import CHECK, ENTRY, FORMAT_VERSION, Hash, Index, StoredWeight, mask_key, text_digest
from gapfx.masks import count_kept, num_bytes, pack
from gapfx.ops.expand import packed_of
from gapfx.plan import Plan, Weight

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Coded:
    """One sparse weight, ready to be written: how it is held, its packed mask and its mask as it is stored."""

    weight: StoredWeight
    bits: Tensor
    mask: Tensor


def write_sparse(
    path: Path,
    source: Source,
    *,
    plan: Plan | None = None,
    masks: Mapping[str, Tensor] | None = None,
    is_compressed: bool = False,
) -> Index:
    """Write the tensors of a source to a sparse file, and give its index.

    Weights of the plan are sparse, and those with packed `masks`, under these, else where they are not 0. Other
    floating tensors are sparse where that is smaller, and lose the sign of their zeros. A tensor is read twice, so that
    one at a time is in memory. `is_compressed` also compresses values (needs zstandard). Raises OSError.
    """
    planned = {weight.fqn: weight for weight in plan.weights()} if plan else {}
    aliases = {alias for weight in planned.values() for alias in weight.aliases}
    entries: list[Entry] = []
    stored: list[StoredWeight] = []
    for key in source.keys():  # noqa: SIM118
        if key in aliases:
            continue
        coded = _coded(source, key, planned.get(key), (masks or {}).get(key))
        if coded is None:
            entries.append(Entry(key, *source.like(key), partial(source.tensor, key)))
            continue
        made, weight = _values(source, key, coded, is_compressed)
        entries += [made, Entry(mask_key(key), torch.uint8, tuple(coded.mask.shape), partial(_same, coded.mask))]
        stored.append(weight)
    hashes = tuple(Hash(entry.key, digest(entry.make())) for entry in entries)
    versions = (importlib.metadata.version("gapfx"), torch.__version__)
    index = Index(FORMAT_VERSION, *versions, plan.to_json() if plan else "", tuple(stored), hashes)
    text = json.dumps(dataclasses.asdict(index))
    write_tensors(path, entries, {"format": "gapfx", ENTRY: text, CHECK: text_digest(text)})
    return index


def _coded(source: Source, key: str, planned: Weight | None, bits: Tensor | None) -> Coded | None:
    """How a tensor is held sparse; None where it is better held dense."""
    dtype, shape = source.like(key)
    is_wanted = planned is not None or bits is not None
    if not is_wanted and (dtype not in _FLOATING or not math.prod(shape)):
        return None
    if bits is None:
        bits = pack(source.tensor(key).ne(0))
    numel, live = math.prod(shape), count_kept(bits)
    if not is_wanted and live == numel:
        return None
    gaps = mask_code.encode(bits, numel)
    is_coded = gaps.num_bytes < num_bytes(numel)
    mask = torch.from_numpy(np.concatenate([gaps.unary, gaps.low])) if is_coded else bits
    if not is_wanted and mask.numel() + live * dtype.itemsize >= numel * dtype.itemsize:
        return None
    weight = StoredWeight(
        key=key,
        shape=shape,
        dtype=TYPES[dtype],
        live=live,
        pattern=planned.pattern if planned else "unstructured",
        mask="gaps" if is_coded else "bits",
        low_bits=gaps.low_bits if is_coded else 0,
        unary_bytes=gaps.unary.size if is_coded else 0,
        aliases=planned.aliases if planned else (),
    )
    return Coded(weight, bits, mask)


def _values(source: Source, key: str, coded: Coded, is_compressed: bool) -> tuple[Entry, StoredWeight]:
    """The entry of a weight's live values, and the weight as it is held then."""
    weight, dtype = coded.weight, source.like(key)[0]
    make: Callable[[], Tensor] = partial(_live, source, key, coded.bits, weight.live)
    if not is_compressed:
        return Entry(key, dtype, (weight.live,), make), weight
    planes = value_code.encode(make())
    sizes = tuple(len(plane) for plane in planes)
    blob = torch.from_numpy(np.frombuffer(b"".join(planes), np.uint8).copy())
    return Entry(key, torch.uint8, (sum(sizes),), partial(_same, blob)), dataclasses.replace(weight, planes=sizes)


def _live(source: Source, key: str, bits: Tensor, live: int) -> Tensor:
    return packed_of(source.tensor(key), bits, (live, 1)).reshape(live)


def _same(tensor: Tensor) -> Tensor:
    return tensor
