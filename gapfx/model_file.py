"""Writes the trained model as dense weights with zeros in place, one tensor at a time.

The safetensors library writes a file from tensors that are all in memory; here ranks hold a model in slices, and none
of them needs to hold more than one weight of it. The format: 8 bytes of length, that much JSON, the tensors one after
another (https://github.com/huggingface/safetensors). Reading is the library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.runtime.engine import buffers_of
from gapfx.runtime.exchange import build_module
from gapfx.runtime.ranks import raise_together
from gapfx.runtime.state import TrainState, whole
from gapfx.runtime.steps import Job

_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
Maker = Callable[[], Tensor]


def write_model(path: Path, job: Job, state: TrainState) -> None:
    """Write the state under the model's own keys and dtypes, on rank 0 (collective).

    Extra state that is no tensor has no place in the file. Raises UserError on every rank when the disk refuses.
    """
    entries = sorted(_entries(job, state), key=lambda entry: -entry[1].element_size())  # the format's order
    temporary, failure = path.with_name(f".{path.name}.writing"), None
    file: BinaryIO | None = None
    try:
        if state.peers.rank == 0:
            file = temporary.open("wb")
            file.write(_header([(key, like) for key, like, _ in entries]))
    except OSError as error:
        failure = error
    for _, _, make in entries:
        tensor = make()
        try:
            if file is not None and failure is None:
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:  # the others still wait for this rank's slices
            failure = error
    failure = _close(file, temporary, path, failure)
    raise_together(state.peers, failure)


def _close(file: BinaryIO | None, temporary: Path, path: Path, failure: OSError | None) -> UserError | None:
    try:
        if file is not None:
            file.close()
            if failure is None:
                temporary.replace(path)
    except OSError as error:
        failure = failure or error
    if failure is None:
        return None
    temporary.unlink(missing_ok=True)
    return UserError(
        f"the model could not be written: {failure}",
        where=str(path),
        fix="free disk space and continue with --resume; the last checkpoint holds the trained weights",
    )


def _header(entries: list[tuple[str, Tensor]]) -> bytes:
    facts: dict[str, object] = {}
    at = 0
    for key, like in entries:
        size = math.prod(like.shape) * like.element_size()
        facts[key] = {"dtype": _TYPES[like.dtype], "shape": list(like.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entries(job: Job, state: TrainState) -> Iterator[tuple[str, Tensor, Maker]]:
    """(key, a tensor of its dtype and shape, what makes it) for the state that a new model of the task has."""
    skeleton = job.module
    parameters = {id(parameter): fqn for fqn, parameter in skeleton.named_parameters()}
    buffers = {id(buffer): fqn for fqn, buffer in buffers_of(skeleton)}
    changed: dict[str, Tensor] = {}
    for key, value in skeleton.state_dict(keep_vars=True).items():
        if id(value) in parameters:
            yield key, value, _parameter(state, parameters[id(value)], value.dtype)
        elif id(value) in buffers:
            held = state.buffers[buffers[id(value)]]
            yield key, held, lambda held=held: held.cpu()
        elif isinstance(value, Tensor):
            # What a hook of the model makes of its weights, only the whole model can tell.
            changed = changed or _changed(job, skeleton, state)
            made = changed[key]
            yield key, made, lambda made=made: made


def _parameter(state: TrainState, fqn: str, dtype: torch.dtype) -> Maker:
    return lambda: whole(state, state.weights, fqn).to(dtype)


def _changed(job: Job, skeleton: nn.Module, state: TrainState) -> dict[str, Tensor]:
    module = build_module(job.plan, skeleton, state, frozenset()).cpu()
    return {key: value.detach() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
